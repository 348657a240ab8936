"""A trained run, for use: load it, adapt it to examples, predict or generate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import Adapted, BatchNormPolicy, MetaLayer
from mlframework.meta_layers.predictive import Predictive
from mlframework.runs.build import build_device
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.saved import read
from mlframework.tasks.text.text_tasks import as_text
from mlframework.text.generation import Sampling, generate

__all__ = ["TaskModel", "Trained", "load"]

log = logging.getLogger(__name__)


def load(run: str | Path, *, weights: str = "best", device: str = "auto", classes: Sequence[type] = ()) -> Trained:
    """The trained algorithm of a run folder, or of a file that `save` wrote.

    Args:
        weights: of a run folder: `best` or `last`.
        device: `auto`, `cpu`, `cuda`, ...
        classes: classes of your own that a file may name, beside those of this package and of installed plug-ins.
    """
    if Path(run).is_file():
        return Trained(read(Path(run), classes).to(build_device(device)))
    return Trained(load_run(RunFolder(run, key="run"), weights=weights, device=device).meta_layer)


class Trained:
    """An algorithm that has been meta-trained, on its device."""

    def __init__(self, meta_layer: MetaLayer) -> None:
        self.meta_layer = meta_layer.eval()
        self.meta_layer.engine = "loop"  # takes any module; there is one task at a time
        self.device = next(meta_layer.parameters(), torch.empty(0)).device

    def adapt(
        self, x: Any, y: Any = None, *, inner_steps: int | None = None, support_chunk: int | None = None
    ) -> TaskModel:
        """The model of one new task, from its support set.

        Args:
            x: inputs `[n, *x_shape]`, as an array, a tensor or lists; without `y`, the texts of a text task or
                `Examples` of one task, leaves `[1, n, ...]`.
            y: targets: values `[n, out_features]`, or class ids `[n]`.
            inner_steps: None: the algorithm's own number at test, which is 0 without an inner loop.
            support_chunk: examples at a time, for a support set larger than memory; None: as the run was trained.
        """
        support = self.support_set(x, y).to(self.device)
        steps = self.meta_layer.test_inner_steps if inner_steps is None else inner_steps
        if steps < 0:
            raise InvalidValue("inner_steps", steps, "must be at least 0, or null for the algorithm's own number")
        if support_chunk is not None:
            self.meta_layer.take_support_by(support_chunk)
        with torch.no_grad():
            adapted = last(self.meta_layer.trajectory(support, steps))
        return TaskModel(self.meta_layer, adapted, support)

    def support_set(self, x: Any, y: Any) -> Examples:
        if y is None:
            return x if isinstance(x, Examples) else as_text(self.meta_layer.task).encode(x)
        spec = self.meta_layer.task.spec
        y_shape = {"regression": (spec.out_features,), "classification": (), "sequence": spec.x_shape}[spec.kind]
        numbers = next(self.meta_layer.parameters(), torch.empty(0)).dtype
        inputs = as_tensor("x", x, spec.x_shape, torch.long if spec.kind == "sequence" else numbers)
        targets = as_tensor("y", y, y_shape, numbers if spec.kind == "regression" else torch.long)
        if len(inputs) != len(targets):
            raise InvalidValue("y", f"{len(targets)} targets", f"must be one for each of {len(inputs)} inputs")
        positions = spec.x_shape if spec.kind == "sequence" else ()
        return Examples(inputs[None], targets[None], torch.ones(1, len(inputs), *positions))


class TaskModel:
    """A task's own model: the one that a support set led to, `adapted`, leaves `[1, ...]`.

    The support set, leaves `[1, n, ...]`, normalises queries where the batch-norm policy says so.
    """

    def __init__(self, meta_layer: MetaLayer, adapted: Adapted, support: Examples) -> None:
        self.meta_layer, self.adapted, self.support = meta_layer, adapted, support
        self.warned = False

    def predict(self, x: Any, *, batch_norm: BatchNormPolicy | None = None) -> Tensor:
        """Predictions `[n, ..., out_features]` for inputs `[n, *x_shape]`, by the code that evaluation uses.

        Under `support` and `inductive` a query's prediction depends on the support set and on that query alone: one
        query or a hundred give the same numbers. Under `transductive` queries are normalised by one another: hand over
        all of them in one call, for a prediction depends on the others in it. Without layers that mix examples all
        policies are the same.

        Args:
            x: the queries, as an array, a tensor or lists.
            batch_norm: the policy; None takes the algorithm's own.

        Raises:
            InvalidValue: no such policy; or it is `transductive`, examples mix, and there is only one query.
        """
        policy, episode = self.asked(x, batch_norm)
        with torch.no_grad():
            return self.meta_layer.predict_query(self.adapted, episode, policy)[0]

    def predict_distribution(self, x: Any, *, batch_norm: BatchNormPolicy | None = None) -> Predictive:
        """The predictive distribution, each leaf `[n, ..., out_features]`, with the arguments of `predict`.

        A regression has a variance if the algorithm states one, else None; the softmax of the logits of classes is
        their distribution.
        """
        policy, episode = self.asked(x, batch_norm)
        with torch.no_grad():
            prediction, variance = self.meta_layer.query_distribution(self.adapted, episode, policy)
        return Predictive(prediction[0], None if variance is None else variance[0])

    def asked(self, x: Any, batch_norm: BatchNormPolicy | None) -> tuple[BatchNormPolicy, Episode]:
        """The policy, checked, and an episode whose queries are the inputs."""
        policy = self.meta_layer.batch_norm if batch_norm is None else batch_norm
        self.meta_layer.check_policy(policy)
        if policy == "transductive" and self.meta_layer.base_layer.mixes_examples:
            if len(x) < 2:
                why = "normalises queries by one another, and there is only one: hand over all of them, or take support"
                raise InvalidValue("batch_norm", "transductive", why)
            if not self.warned:
                self.warned = True
                log.warning("batch_norm=transductive: predictions hold for these %d queries together", len(x))
        spec = self.meta_layer.task.spec
        x_shape = None if spec.kind == "sequence" else spec.x_shape  # a sequence may be of another length
        x = as_tensor("x", x, x_shape, self.support.x.dtype).to(self.support.x.device).unsqueeze(0)
        positions = x.shape[2:] if spec.kind == "sequence" else ()
        mask = self.support.mask.new_ones(*x.shape[:2], *positions)
        return policy, Episode(self.support, Examples(x, mask, mask))  # predictions do not read targets

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


def as_tensor(name: str, values: Any, shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """Values `[n, *shape]` as a tensor; None: of any shape."""
    tensor = torch.as_tensor(values)
    if shape is not None and (not tensor.dim() or tuple(tensor.shape[1:]) != shape):
        raise InvalidValue(name, f"an array of shape {tuple(tensor.shape)}", f"must be of shape {('n', *shape)}")
    return tensor.to(dtype)
