"""The outer loop: a meta-batch of tasks to a meta-gradient to a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mlframework.capture import Capture
from mlframework.compiled import Gradients
from mlframework.engine import choose_engine
from mlframework.episode import Episode
from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics

__all__ = ["MissingGradient", "NotFinite", "OuterLoop", "meta_gradient"]


class MissingGradient(UserError):
    """A meta-parameter that the meta-loss does not depend on."""


class NotFinite(FailedRun):
    """A meta-loss or meta-gradient that is infinite or not a number.

    Attributes:
        tasks: which tasks of the meta-batch have such a loss; none where only the gradient is at fault.
    """

    def __init__(self, what: str, tasks: list[int]) -> None:
        super().__init__(what)
        self.tasks = tasks


def meta_gradient(
    meta_layer: MetaLayer,
    episode: Episode,
    *,
    chunk: int | None = None,
    gradients_of: Callable[[Episode], Gradients] | None = None,
) -> tuple[Tensor, Metrics]:
    """Sets `.grad` of every meta-parameter to the gradient of the meta-loss, averaged over tasks.

    Args:
        meta_layer: the algorithm.
        episode: the meta-batch.
        chunk: tasks at a time; each chunk's graph is freed before the next is built, so memory is that of one chunk.
        gradients_of: how an episode's gradients are found; by default eagerly, see `mlframework.capture`.

    Returns:
        The meta-loss of each task `[tasks]` and the metrics, detached.

    Raises:
        MissingGradient: a meta-parameter took no part: it would never be learned, in silence.
    """
    parts = []
    meta_layer.zero_grad(set_to_none=True)
    for part in episode.chunks(chunk or episode.num_tasks):
        if gradients_of is None:
            losses, metrics = meta_layer.meta_loss(part)
            (losses.sum() / episode.num_tasks).backward()
        else:
            losses, metrics, by_name = gradients_of(part)
            accumulate(meta_layer, by_name, episode.num_tasks)
        parts.append({**metrics, "meta_loss": losses})
    report_missing(meta_layer)
    joined = {name: torch.cat([part[name].detach() for part in parts]) for name in parts[0]}
    return joined.pop("meta_loss"), joined


def accumulate(meta_layer: nn.Module, by_name: Mapping[str, Tensor], num_tasks: int) -> None:
    """Adds gradients of summed losses, divided by the number of tasks, to `.grad`."""
    for (name, _), grad in zip(by_name.items(), torch._foreach_div(list(by_name.values()), num_tasks), strict=True):
        parameter = meta_layer.get_parameter(name)
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def report_missing(meta_layer: nn.Module) -> None:
    """Raises `MissingGradient` with the names of meta-parameters that got no gradient."""
    missing = [name for name, p in meta_layer.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise MissingGradient(
            f"no gradient reaches {', '.join(missing)}: "
            "what takes no part must be said, as in algorithm.frozen='<pattern>'"
        )


class OuterLoop:
    """Steps an optimizer along meta-gradients.

    Args:
        meta_layer: the algorithm.
        optimizer: over `meta_layer.parameters()`.
        scheduler: of the outer rate, stepped once per outer step.
        engine: `auto`, `vectorised` or `loop`; see `mlframework.engine`.
        chunk: tasks at a time, to save memory; None takes the meta-batch whole.
        clip: the largest norm of the meta-gradient; None leaves it as it is.
        capture: `auto`, `true` or `false`: whether the step becomes one compiled graph; see `mlframework.capture`.
    """

    def __init__(
        self,
        meta_layer: MetaLayer,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        engine: str = "auto",
        chunk: int | None = None,
        clip: float | None = None,
        capture: str | bool = "false",
    ) -> None:
        if chunk is not None and chunk < 1:
            raise InvalidValue("chunk", chunk, "must be at least 1, or null for all tasks at once")
        if clip is not None and not clip > 0:
            raise InvalidValue("clip", clip, "must be above 0, or null for no clipping")
        self.meta_layer, self.optimizer, self.scheduler = meta_layer, optimizer, scheduler
        self.engine, self.chunk, self.clip = engine, chunk, clip
        self.capture = Capture(meta_layer, str(capture).lower())

    def prepare(self, episode: Episode) -> None:
        """Chooses the engine, by trying it on an episode."""
        self.meta_layer.engine = choose_engine(self.meta_layer, episode, self.engine)

    def step(self, episode: Episode) -> Metrics:
        """One outer step; returns the means over tasks, the norm before clipping and the rate, detached scalar tensors.

        Raises:
            NotFinite: before the optimizer has moved anything.
        """
        self.meta_layer.train()
        self.meta_layer.outer_step = self.scheduler.last_epoch
        way = None if self.capture.wanted == "false" else self.capture
        losses, metrics = meta_gradient(self.meta_layer, episode, chunk=self.chunk, gradients_of=way)
        limit = float("inf") if self.clip is None else self.clip
        norm = nn.utils.clip_grad_norm_(self.meta_layer.parameters(), limit)
        if not torch.isfinite(losses.sum() + norm):
            tasks = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
            raise NotFinite(f"the meta-{'loss' if tasks else 'gradient'} is not finite", tasks)
        lr = torch.tensor(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        return {**{name: value.mean() for name, value in metrics.items()}, "meta_grad_norm": norm.detach(), "lr": lr}
