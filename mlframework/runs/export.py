"""A task's model as a file that runs without this package: ONNX, or a program of `torch.export`."""

from __future__ import annotations

import io
import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import MIXING
from mlframework.base_layers.normalisation import BatchStatistics
from mlframework.episode import Episode, Examples
from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.files import atomic
from mlframework.meta_layers.meta_layer import Adapted, BatchNormPolicy, MetaLayer
from mlframework.runs.portable import portable
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["export_model"]

#: Formats by the ending of the file's name.
FORMATS = (".onnx", ".pt2")

#: What the format `.onnx` needs; the extra `onnx` has them.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

#: The largest difference between the file's predictions and the model's, relative to the largest prediction or, where
#: that is larger, to what a prediction of 1 in the task's numbers is to the user.
TOLERANCE = 1e-4


class TaskPredictor(nn.Module):
    """Predictions `[n, ..., out_features]` of one task's model for inputs `[n, *x_shape]`, without an axis of tasks.

    Queries are normalised by the support set. Where every layer that mixes examples is a `BatchStatistics`, whose
    statistics of the support set are constants, that set is not read again. Otherwise the queries are predicted
    together with it.
    """

    meta_layer: MetaLayer
    adapted: Adapted
    support: Examples
    decode: Callable[[Tensor], Tensor]

    def __init__(
        self, meta_layer: MetaLayer, adapted: Adapted, support: Examples, decode: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        # Not as a part: a program would then hold every parameter, those that a task's own replace among them.
        self.__dict__.update(meta_layer=meta_layer, adapted=adapted, support=support, decode=decode)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.outputs(x))

    def outputs(self, x: Tensor) -> Tensor:
        """Predictions in the task's own numbers, of all classes of the training."""
        layer, x = self.meta_layer, x.unsqueeze(0)
        norms = mixing(layer)
        if all(isinstance(norm, BatchStatistics) and norm.fixed for norm in norms):
            return layer.predict(self.adapted, x).squeeze(0)
        positions = x.shape[2:] if layer.task.spec.kind == "sequence" else ()
        mask = self.support.mask.new_ones(*x.shape[:2], *positions)
        return layer.predict_query(self.adapted, Episode(self.support, Examples(x, mask, mask)), "support").squeeze(0)


def export_model(
    meta_layer: MetaLayer,
    adapted: Adapted,
    support: Examples,
    path: str | Path,
    *,
    batch_norm: BatchNormPolicy,
    decode: Callable[[Tensor], Tensor],
) -> Path:
    """Writes a task's model, checks the file's predictions for the support set against the model's, and names the file.

    Args:
        adapted, support: of one task, leaves `[1, ...]`.
        path: ends in `.onnx` or `.pt2`. The input is `x` `[n, *x_shape]`, with any `n`; the output `prediction`.
        batch_norm: `support`, where layers mix examples: an exported model predicts each query by itself.
        decode: the user's own units, or the task's own classes, of predictions in the task's numbers.

    Raises:
        InvalidValue: another ending, or another policy.
        UserError: a package is missing, or the format cannot hold the model: the line names the operator.
    """
    path = Path(path).expanduser()
    check(meta_layer, path, batch_norm)
    inputs = support.x.squeeze(0)
    with torch.no_grad(), statistics_fixed(meta_layer, adapted, support), quiet():
        scale, affine = as_constants(decode, meta_layer.task, path)
        predictor = TaskPredictor(meta_layer, adapted, support, affine).eval()
        program = as_program(meta_layer, predictor, inputs, path)
        content, run = written(meta_layer, program, path)
        for rows in (inputs[:1], inputs, torch.cat([inputs, inputs])):
            compare(run(rows), decode(predictor.outputs(rows)), scale, path)
    with atomic(path) as part:
        part.write_bytes(content)
    return path


def check(meta_layer: MetaLayer, path: Path, batch_norm: str) -> None:
    """Refuses a format, a policy or a lack of packages in one line."""
    if path.suffix not in FORMATS:
        raise InvalidValue("path", path, "must end in .onnx, or in .pt2 for a program of torch.export")
    if mixing(meta_layer):
        if batch_norm != "support":
            why = "an exported model predicts each query by itself: take support, which the support set normalises"
            raise InvalidValue("batch_norm", batch_norm, why)
        meta_layer.check_policy(batch_norm)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(f"{path}: needs {', '.join(missing)}: pip install 'mlframework[onnx]'")


def as_constants(
    decode: Callable[[Tensor], Tensor], task: TaskDistribution, path: Path
) -> tuple[float, Callable[[Tensor], Tensor]]:
    """`decode` as a program can hold it, values by a constant scale and a constant offset; and the largest scale."""
    if task.spec.kind != "regression":
        return 1.0, decode
    zero = torch.zeros(1, task.spec.out_features, dtype=torch.float64)
    offset = decode(zero)
    scale = decode(zero + 1) - offset
    if not torch.allclose(decode(zero - 3), offset - 3 * scale, rtol=1e-9, atol=0):
        why = "decode_values must be a scale and an offset: a program holds nothing else of it"
        raise UserError(f"{path}: {type(task).__name__}.{why}")
    largest = float(scale.abs().max())
    if bool((scale == 1).all() and (offset == 0).all()):
        return largest, lambda values: values
    return largest, lambda values: values * scale.to(values) + offset.to(values)


def mixing(meta_layer: MetaLayer) -> list[nn.Module]:
    """The modules whose output for an example depends on the examples beside it."""
    return [module for module in meta_layer.base_layer.modules() if isinstance(module, MIXING)]


@contextmanager
def statistics_fixed(meta_layer: MetaLayer, adapted: Adapted, support: Examples) -> Iterator[None]:
    """Within this context every batch norm normalises by the support set's statistics, as constants.

    A norm that is called several times has no single statistics: then none is fixed.
    """
    found: dict[BatchStatistics, list[tuple[Tensor, Tensor]]] = {}

    def record(norm: BatchStatistics, given: tuple[Any, ...], _: Tensor) -> None:
        _, mean, variance = norm.moments(*given)
        found.setdefault(norm, []).append((mean, variance))

    norms = [norm for norm in mixing(meta_layer) if isinstance(norm, BatchStatistics)]
    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_hook(record))
        if norms:
            meta_layer.predict(adapted, support.x, support.mask)
    once = all(len(found.get(norm, ())) == 1 for norm in norms)
    try:
        for norm, calls in found.items() if once else ():
            norm.fixed = calls[0]
        yield
    finally:
        for norm in norms:
            norm.fixed = None


def as_program(meta_layer: MetaLayer, predictor: TaskPredictor, inputs: Tensor, path: Path) -> Any:
    """The predictor as a program for any number of inputs."""
    example = torch.cat([inputs[:1]] * 3)  # a number that nothing else has
    settings: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "strict": False}
    try:
        with portable(lambda: predictor(example)):
            return torch.export.export(predictor, (example,), **settings)
    except Exception as error:  # whatever torch and a user's module may raise
        raise refused(meta_layer, path, error) from error


def written(meta_layer: MetaLayer, program: Any, path: Path) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """The content of the file, and a function that runs it."""
    content = io.BytesIO()
    if path.suffix == ".pt2":
        torch.export.save(program, content)
        content.seek(0)
        loaded = torch.export.load(content)
        return content.getvalue(), loaded.module()
    try:
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["prediction"]}
        made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except Exception as error:  # whatever the exporter may raise
        raise refused(meta_layer, path, error) from error
    assert made is not None
    proto = made.model_proto.SerializeToString()
    return proto, in_onnxruntime(proto)


def in_onnxruntime(content: bytes) -> Callable[[Tensor], Tensor]:
    """Runs a model on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0])


def compare(found: Tensor, wanted: Tensor, scale: float, path: Path) -> None:
    """Refuses a file whose predictions are not the model's."""
    wanted = wanted.cpu()
    off, most = float((found.cpu() - wanted).abs().max()), TOLERANCE * max(scale, float(wanted.abs().max()))
    if not off <= most:
        raise FailedRun(f"{path}: not written: its predictions differ from the model's by {off:.1e}")


def refused(meta_layer: MetaLayer, path: Path, error: BaseException) -> UserError:
    """One line for a model that a format cannot hold; it names the operator where there is one."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = " ".join(str(cause) for cause in causes)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    why = f"there is no operator for {operator[1]}" if operator else first_line(causes[-1])
    return UserError(f"{path}: {type(meta_layer).__name__} cannot be written in this format: {why}")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's own remarks, such as one that torchvision is missing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
