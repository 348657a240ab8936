"""The outer loop: meta-loss, meta-gradient, clipping, a step of the optimizer, the schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlframework import processes
from mlframework.backend.step import Capture, Gradients, Planner, optimizer_step
from mlframework.episode import Episode
from mlframework.errors import FailedRun, InvalidValue
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.training.all_reduce import AllReduce
from mlframework.training.buffers import follow_parameters, refresh
from mlframework.training.meta_gradient import ClippedMean, clipped, learned_by, meta_gradient, report_missing

__all__ = ["NotFinite", "OuterLoop"]


class NotFinite(FailedRun):
    """The meta-loss of some `tasks` of the meta-batch is infinite or NaN; if of none, the meta-gradient is."""

    def __init__(self, what: str, tasks: list[int]) -> None:
        super().__init__(what)
        self.tasks = tasks


class OuterLoop:
    """Steps an optimizer along meta-gradients.

    Args:
        optimizer: over `meta_layer.parameters()`.
        scheduler: of the outer rate, stepped once per outer step.
        clip: the largest norm of the meta-gradient; None leaves it as it is.
        capture: `auto`, `true` or `false`: whether the step is compiled.
        engine, chunk, memory_limit: how a meta-batch is gone through; see `mlframework.backend.plan.Planner`.
        support_chunk: examples of a support set at a time; see `MetaLayer.take_support_by`.
        precision: `float32`, or `bf16` for the base layer's products; see `MetaLayer.multiply_in`.
    """

    def __init__(
        self,
        meta_layer: MetaLayer,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        engine: str = "auto",
        chunk: int | str | None = None,
        clip: float | None = None,
        capture: str | bool = "false",
        memory_limit: float | None = None,
        support_chunk: int | None = None,
        precision: str = "float32",
    ) -> None:
        if clip is not None and not clip > 0:
            raise InvalidValue("clip", clip, "must be above 0, or null for no clipping")
        self.meta_layer, self.optimizer, self.scheduler, self.clip = meta_layer, optimizer, scheduler, clip
        meta_layer.take_support_by(support_chunk)
        meta_layer.multiply_in(precision)
        if precision == "bf16" and str(capture).lower() != "false":
            raise InvalidValue("precision", precision, "is for steps that are not compiled: use capture=false")
        self.capture = Capture(meta_layer, str(capture).lower(), ClippedMean(clip))
        self.captures = self.capture.wanted != "false"
        gradient = functools.partial(meta_gradient, meta_layer)
        self.planner = Planner(
            meta_layer, gradient, self.capture, engine=engine, chunk=chunk, memory_limit=memory_limit
        )
        self.learned = learned_by(meta_layer)
        self.all_reduce = AllReduce(self.learned)
        #: Numbers that this rank tells the others with its gradient, and their sums over all ranks.
        self.notes: Sequence[float] = ()
        self.heard: list[float] = []
        self.writes_buffers: bool | None = None

    def prepare(self, episode: Episode) -> None:
        """Chooses the engine by trying it on an episode; finds out whether the base layer writes to its buffers."""
        self.writes_buffers = follow_parameters(self.meta_layer.base_layer, *episode)
        self.planner.prepare(episode)

    def step(self, episode: Episode, tasks: int | None = None) -> Metrics:
        """One outer step; returns the means over tasks, the norm before clipping and the rate, detached scalar tensors.

        Args:
            tasks: of the whole meta-batch, of which the episode is this rank's share; None: the episode is all of it.

        Raises:
            NotFinite: before the optimizer has moved anything.
        """
        if not self.meta_layer.training:
            self.meta_layer.train()
        self.meta_layer.outer_step = self.scheduler.last_epoch
        losses, _, by_name, summary = self.clipped_gradient(episode, tasks or episode.num_tasks)
        assert summary is not None
        check_finite(losses, summary.total)
        check_rates(self.scheduler)
        lr = torch.tensor(self.scheduler.get_last_lr()[0])
        for name, grad in by_name.items():
            self.learned[name].grad = grad
        if self.captures:
            optimizer_step(self.optimizer)  # after an eager step the gain is small
        else:
            self.optimizer.step()
        self.refresh_buffers(episode)
        self.scheduler.step()
        return {**summary.means, "meta_grad_norm": summary.norm, "lr": lr}

    def clipped_gradient(self, episode: Episode, tasks: int) -> Gradients:
        """The mean meta-gradient over all tasks, clipped, with its summary: in one graph, or chunk by chunk."""
        chunk, shared = self.planner.follow(episode).chunk, processes.count() > 1
        if self.captures and not shared and (chunk is None or chunk >= episode.num_tasks):
            found = self.capture(episode, whole=True)
            report_missing(self.meta_layer, [name for name in self.learned if name not in found.by_name])
            return found
        gradients_of = self.capture if self.captures else None
        losses, metrics = meta_gradient(
            self.meta_layer, episode, chunk=chunk, gradients_of=gradients_of, learned=self.learned, tasks=tasks
        )
        found = Gradients(losses, metrics, {name: p.grad for name, p in self.learned.items() if p.grad is not None})
        if shared:
            found, self.heard = self.all_reduce(found, self.notes, tasks)
        return clipped(found, self.clip)

    def refresh_buffers(self, episode: Episode) -> None:
        """Lets buffers follow the parameters, as spectral norm's do: tasks write to copies of them."""
        if self.writes_buffers is None:
            self.writes_buffers = follow_parameters(self.meta_layer.base_layer, *episode)
        if self.writes_buffers:
            refresh(self.meta_layer.base_layer, episode.support)


def check_finite(losses: Tensor, total: Tensor) -> None:
    """Raises `NotFinite` unless all losses `[tasks]` and the norm of the meta-gradient, in `total`, are finite."""
    if not math.isfinite(total):
        tasks = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
        raise NotFinite(f"the meta-{'loss' if tasks else 'gradient'} is not finite", tasks)


def check_rates(scheduler: LRScheduler) -> None:
    """Refuses to step with a rate that makes parameters infinite or goes uphill."""
    for rate in scheduler.get_last_lr():
        if not 0 <= rate <= torch.finfo(torch.float32).max:
            raise FailedRun(f"the outer rate is {rate:g} after {scheduler.last_epoch} steps: see the keys of schedule")
