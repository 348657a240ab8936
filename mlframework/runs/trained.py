"""A trained run, for use: load it, adapt it to examples, predict or generate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidData, InvalidValue
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import Adapted, BatchNormPolicy, MetaLayer
from mlframework.meta_layers.predictive import Predictive
from mlframework.runs.build import build_device
from mlframework.runs.export import export_model
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.saved import OwnNumbers, Stored, of_classes, read, read_model, save_model
from mlframework.runs.trusted import vouching
from mlframework.tasks.own_data import as_inputs, as_numbers, require_finite
from mlframework.tasks.text.text_tasks import as_text
from mlframework.text.generation import Sampling, generate

__all__ = ["TaskModel", "Trained", "load"]

log = logging.getLogger(__name__)


def load(run: str | Path, *, weights: str = "best", device: str = "auto", classes: Sequence[type] = ()) -> Trained:
    """The trained algorithm of a run folder, or of a file that `save` wrote; the data it was trained on is not read.

    Args:
        weights: of a run folder: `best` or `last`.
        device: `auto`, `cpu`, `cuda`, ...
        classes: classes of your own that the folder or the file may name, beside those of this package and of
            installed plug-ins. A run folder that you made on this machine needs none.
    """
    if Path(run).is_file():
        return Trained(read(Path(run), classes).to(build_device(device)))
    with vouching(classes):
        return Trained(load_run(RunFolder(run, key="run"), weights=weights, device=device).meta_layer)


class Trained:
    """An algorithm that has been meta-trained, on its device."""

    def __init__(self, meta_layer: MetaLayer) -> None:
        self.meta_layer = meta_layer.eval()
        self.meta_layer.engine = "loop"  # takes any module; there is one task at a time
        self.like = next(meta_layer.parameters(), torch.empty(0))  # prototypes of plain inputs have no parameters
        self.device = self.like.device

    def adapt(
        self,
        x: Any,
        y: Any = None,
        *,
        inner_steps: int | None = None,
        n_way: int | None = None,
        support_chunk: int | None = None,
    ) -> TaskModel:
        """The model of one new task, from its support set.

        Args:
            x: inputs, in any form that the task's `encode_inputs` takes: arrays `[n, *x_shape]` of any numeric type,
                images as files or PIL images, a data frame; without `y`, the texts of a text task or `Examples` of one
                task, leaves `[1, n, ...]`, in the task's own numbers.
            y: targets: values `[n, out_features]` in the data's own units, or class ids `[n]`.
            inner_steps: None: the algorithm's own number at test, which is 0 without an inner loop.
            n_way: classes of this task; None: as many as in training.
            support_chunk: examples at a time, for a support set larger than memory; None: as the run was trained.
        """
        layer, classes = self.layer_for(n_way), n_way
        own = None if y is None else own_numbers(layer, x, y)
        support = (self.given(x) if own is None else self.support_set(layer, x, y, own)).to(self.device)
        steps = layer.test_inner_steps if inner_steps is None else inner_steps
        if steps < 0:
            raise InvalidValue("inner_steps", steps, "must be at least 0, or null for the algorithm's own number")
        if support_chunk is not None:
            layer = copy.copy(layer)  # the run itself stays as it is
            layer.take_support_by(support_chunk)
        with torch.no_grad():
            adapted = last(layer.trajectory(support, steps))
        return TaskModel(layer, adapted, support, own=own, n_way=classes)

    def layer_for(self, n_way: int | None) -> MetaLayer:
        """The algorithm for tasks of so many classes.

        Raises:
            InvalidData: it was trained with fewer, and its networks have no more outputs.
        """
        layer, spec = self.meta_layer, self.meta_layer.task.spec
        if n_way is None or spec.kind != "classification" or (n_way == spec.out_features):
            return layer
        if layer.any_n_way and layer.task.class_names is None:
            return of_classes(layer, n_way)
        if n_way > spec.out_features:
            why = f"{type(layer).__name__} was trained with {spec.out_features}, and takes no more: train with "
            raise InvalidData("y", f"{n_way} classes", f"{why}task.n_way={n_way}, or choose algorithm=prototypes")
        return layer

    def given(self, x: Any) -> Examples:
        return x if isinstance(x, Examples) else as_text(self.meta_layer.task).encode(x)

    def support_set(self, layer: MetaLayer, x: Any, y: Any, own: OwnNumbers) -> Examples:
        task, numbers = layer.task, self.like.dtype
        inputs = in_numbers("x", task.encode_inputs(x, own.x), numbers)
        targets = in_numbers("y", task.encode_targets(y, own.y), numbers)
        if len(inputs) != len(targets):
            raise InvalidData("y", f"{len(targets)} targets", f"must be one for each of {len(inputs)} inputs")
        if not len(inputs):
            raise InvalidData("x", "0 inputs", "must be at least one: minimum of 1 is required")
        if task.spec.kind == "sequence" and targets.shape != inputs.shape:
            raise InvalidData("y", f"an array of shape {tuple(targets.shape)}", f"must be {tuple(inputs.shape)}, as x")
        positions = inputs.shape[1:] if task.spec.kind == "sequence" else ()
        return Examples(inputs[None], targets[None], torch.ones(1, len(inputs), *positions))


class TaskModel:
    """A task's own model: the one that a support set led to, `adapted`, leaves `[1, ...]`.

    The support set, leaves `[1, n, ...]`, normalises queries where the batch-norm policy says so.

    Args:
        own: the support set as the user's numbers, where the task scales by them; None: `Examples` were given, and
            predictions are in the task's own numbers.
        n_way: classes of this task; the logits of others are left out.
    """

    def __init__(
        self,
        meta_layer: MetaLayer,
        adapted: Adapted,
        support: Examples,
        *,
        own: OwnNumbers | None = None,
        n_way: int | None = None,
    ) -> None:
        self.meta_layer, self.adapted, self.support = meta_layer, adapted, support
        self.own, self.n_way = own, n_way
        self.warned = False

    def save(self, path: str | Path, *, labels: Sequence[Any] | None = None) -> None:
        """Writes the adapted model to one file of safetensors that `TaskModel.load` reads, as `save` writes a run.

        Args:
            labels: names of the classes, for the record.
        """
        save_model(Stored(self.meta_layer, self.adapted, self.support, self.own, self.n_way, labels), Path(path))

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", classes: Sequence[type] = ()) -> TaskModel:
        """The model in a file that `save` wrote; for the arguments see `mlframework.load`."""
        stored = read_model(Path(path), classes, build_device(device))
        return cls(stored.meta_layer, stored.adapted, stored.support, own=stored.own, n_way=stored.n_way)

    def predict(self, x: Any, *, batch_norm: BatchNormPolicy | None = None) -> Tensor:
        """Predictions `[n, ..., out_features]` for inputs as `adapt` takes them, by the code that evaluation uses.

        Under `support` and `inductive` a query's prediction depends on the support set and on that query alone: one
        query or a hundred give the same numbers. Under `transductive` queries are normalised by one another: hand over
        all of them in one call, for a prediction depends on the others in it. Without layers that mix examples all
        policies are the same.

        Args:
            x: the queries.
            batch_norm: the policy; None takes the algorithm's own.

        Raises:
            InvalidValue: no such policy; or it is `transductive`, examples mix, and there is only one query.
        """
        policy, episode = self.asked(x, batch_norm)
        with torch.no_grad():
            prediction = self.meta_layer.predict_query(self.adapted, episode, policy)[0]
        return self.decoded(Predictive(prediction)).prediction

    def predict_distribution(self, x: Any, *, batch_norm: BatchNormPolicy | None = None) -> Predictive:
        """The predictive distribution, each leaf `[n, ..., out_features]`, with the arguments of `predict`.

        A regression has a variance if the algorithm states one, else None; the softmax of the logits of classes is
        their distribution.
        """
        policy, episode = self.asked(x, batch_norm)
        with torch.no_grad():
            prediction, variance = self.meta_layer.query_distribution(self.adapted, episode, policy)
        return self.decoded(Predictive(prediction[0], None if variance is None else variance[0]))

    def decoded(self, found: Predictive) -> Predictive:
        """A prediction in the user's own units, for the classes that this task has."""
        task, (values, variance) = self.meta_layer.task, found
        if task.spec.kind == "classification":
            return Predictive(values[..., : self.n_way])
        if task.spec.kind == "sequence" or self.own is None:
            return found
        own = None if self.own.y is None else self.own.y.to(values.device)
        variance = None if variance is None else task.decode_variance(variance, own)
        return Predictive(task.decode_values(values, own), variance)

    def export(self, path: str | Path, *, batch_norm: BatchNormPolicy | None = None) -> Path:
        """Writes the model to a file that predicts without this package: `model.onnx`, or `model.pt2` of torch.export.

        Its input `x` `[n, *x_shape]` may have any `n`, and is in the task's own numbers, which `queries` gives for
        whatever `predict` takes; its output is what `predict` gives. Before the file takes its name, its predictions
        are checked against the model's.

        Args:
            batch_norm: as in `predict`; where layers mix examples it must be `support`.
        """
        return export_model(
            self.meta_layer,
            self.adapted,
            self.support,
            path,
            batch_norm=batch_norm or self.meta_layer.batch_norm,
            decode=lambda values: self.decoded(Predictive(values)).prediction,
        )

    def asked(self, x: Any, batch_norm: BatchNormPolicy | None) -> tuple[BatchNormPolicy, Episode]:
        """The policy, checked, and an episode whose queries are the inputs."""
        policy = self.meta_layer.batch_norm if batch_norm is None else batch_norm
        self.meta_layer.check_policy(policy)
        x = self.queries(x)
        if policy == "transductive" and self.meta_layer.base_layer.mixes_examples:
            if len(x) < 2:
                why = "normalises queries by one another, and there is only one: hand over all of them, or take support"
                raise InvalidValue("batch_norm", "transductive", why)
            if not self.warned:
                self.warned = True
                log.warning("batch_norm=transductive: predictions hold for these %d queries together", len(x))
        x = x.to(self.support.x.device).unsqueeze(0)
        positions = x.shape[2:] if self.meta_layer.task.spec.kind == "sequence" else ()
        mask = self.support.mask.new_ones(*x.shape[:2], *positions)
        return policy, Episode(self.support, Examples(x, mask, mask))  # predictions do not read targets

    def queries(self, x: Any) -> Tensor:
        """Inputs `[n, *x_shape]` in the task's own numbers, from whatever `predict` takes."""
        task = self.meta_layer.task
        if self.own is None and task.scaled_by_support:  # in the task's own numbers, as the support set was
            found = as_inputs(x, task.spec)
        else:
            found = task.encode_inputs(x, None if self.own is None else self.own.x)
        return in_numbers("x", found, self.support.x.dtype)

    def generate(
        self,
        n: int,
        *,
        prompt: str = "",
        length: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: str | None = None,
        seed: int = 0,
    ) -> list[str]:
        """`n` new texts in the task's manner; see `mlframework.text.generation.Sampling`."""
        sampling, generator = Sampling(length, temperature, top_p, stop), torch.Generator().manual_seed(seed)
        return generate(self.meta_layer, self.adapted, count=n, sampling=sampling, generator=generator, prompt=prompt)


def own_numbers(layer: MetaLayer, x: Any, y: Any) -> OwnNumbers:
    """The user's numbers, where the support set says how they are scaled."""
    if not layer.task.scaled_by_support:
        return OwnNumbers(None, None)
    return OwnNumbers(as_numbers("x", x), as_numbers("y", y) if layer.task.spec.kind == "regression" else None)


def in_numbers(field: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the algorithm's type, whole numbers where they are class ids or tokens; none is NaN or infinite."""
    converted = values.to(dtype) if values.is_floating_point() else values
    require_finite(field, converted)
    return converted
