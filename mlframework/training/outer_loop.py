"""The outer loop: a meta-batch of tasks to a meta-gradient to a step of the optimizer."""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mlframework.backend.allocator import give_back
from mlframework.backend.capture import Capture
from mlframework.backend.choose_engine import choose_engine
from mlframework.backend.compiled import Gradients, summarised
from mlframework.backend.devices import fork_rng, name_of
from mlframework.backend.engine import Engine
from mlframework.backend.optimizer_step import optimizer_step
from mlframework.backend.peak_memory import PeakMemory
from mlframework.backend.stopwatch import fastest
from mlframework.episode import Episode
from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.training.buffers import follow_parameters, refresh

__all__ = ["MissingGradient", "NotFinite", "OuterLoop", "meta_gradient"]

log = logging.getLogger(__name__)


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
    learned: Mapping[str, nn.Parameter] | None = None,
) -> tuple[Tensor, Metrics]:
    """Sets `.grad` of every meta-parameter to the gradient of the meta-loss, averaged over tasks.

    Args:
        meta_layer: the algorithm.
        episode: the meta-batch.
        chunk: tasks at a time; each chunk's graph is freed before the next is built, so memory is that of one chunk.
        gradients_of: how an episode's gradients are found; by default eagerly, see `mlframework.backend.capture`.
        learned: the meta-parameters, for whom they are at hand: to find them takes a while in a small step.

    Returns:
        The meta-loss of each task `[tasks]` and the metrics, detached.

    Raises:
        MissingGradient: a meta-parameter took no part: it would never be learned, in silence.
    """
    parts = []
    learned = learned_by(meta_layer) if learned is None else learned
    for p in learned.values():
        p.grad = None
    for part in episode.chunks(chunk or episode.num_tasks):
        if gradients_of is None:
            losses, metrics = meta_layer.meta_loss(part)
            losses.backward(torch.full_like(losses, 1 / episode.num_tasks))
        else:
            losses, metrics, by_name, _ = gradients_of(part)
            accumulate(learned, by_name, episode.num_tasks)
        parts.append({**metrics, "meta_loss": losses})
    report_missing(meta_layer, [name for name, p in learned.items() if p.grad is None])
    joined = {
        name: torch.cat([part[name] for part in parts]).detach() if len(parts) > 1 else value.detach()
        for name, value in parts[0].items()
    }
    return joined.pop("meta_loss"), joined


def learned_by(meta_layer: MetaLayer) -> dict[str, nn.Parameter]:
    """The meta-parameters by name."""
    return {name: p for name, p in meta_layer.named_parameters() if p.requires_grad}


def accumulate(learned: Mapping[str, Tensor], by_name: Mapping[str, Tensor], num_tasks: int) -> None:
    """Adds gradients of summed losses, divided by the number of tasks, to `.grad`."""
    for name, grad in zip(by_name, torch._foreach_div(list(by_name.values()), num_tasks), strict=True):
        p = learned[name]
        p.grad = grad if p.grad is None else p.grad + grad


def report_missing(meta_layer: MetaLayer, names: Sequence[str]) -> None:
    """Raises `MissingGradient` if there are names of meta-parameters that got no gradient."""
    if names:
        raise MissingGradient(f"no gradient reaches {', '.join(names)}: {'; '.join(advice(meta_layer, names))}")


def advice(meta_layer: MetaLayer, names: Sequence[str]) -> Iterator[str]:
    """What to do about parameters that take no part: the algorithm can freeze those of the base layer alone."""
    inside = [name.removeprefix("base_layer.") for name in names if name.startswith("base_layer.")]
    if inside:
        yield f"freeze unused parameters: algorithm.frozen='{'|'.join(f'^{name}$' for name in inside)}'"
    owners = {name.partition(".")[0] for name in names if not name.startswith("base_layer.")}
    for owner in sorted(owners):
        kind = type(getattr(meta_layer, owner)).__name__
        yield (
            f"{owner} ({kind}) takes no part, and algorithm.frozen names parameters of the base layer alone: "
            f"choose another {owner}, or leave it out"
        )


def check_rates(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Refuses to step with a rate that makes parameters infinite or goes uphill."""
    for rate in scheduler.get_last_lr():
        if not 0 <= rate <= torch.finfo(torch.float32).max:
            raise FailedRun(f"the outer rate is {rate:g} after {scheduler.last_epoch} steps: see the keys of schedule")


class ExecutionPlan(NamedTuple):
    """How a meta-batch is gone through.

    Attributes:
        engine: see `mlframework.backend.engine`.
        chunk: tasks at a time; None: all.
    """

    engine: Engine
    chunk: int | None


#: Tasks at a time, beside one and all, that `chunk=auto` tries.
CHUNKS = (4, 16, 64)

#: Most tasks that a loop takes at a time: stacked updates of all tasks are faster, but keep every task's graph.
FEW = 16

#: Bytes up to which more tasks at a time were seen to make compiled steps faster on a CPU; beyond, they gain some per
#: cent at most, and take memory.
CACHE_BYTES = 9e6


class OuterLoop:
    """Steps an optimizer along meta-gradients.

    Args:
        meta_layer: the algorithm.
        optimizer: over `meta_layer.parameters()`.
        scheduler: of the outer rate, stepped once per outer step.
        engine: `auto`, `vectorised` or `loop`; see `mlframework.backend.engine`.
        chunk: tasks at a time. None: by rule, see `rule_pace`; the same for every run. `auto`: a stopwatch chooses, and
            then `engine=auto` means the faster engine; its choice differs from machine to machine, and so do the bits.
        clip: the largest norm of the meta-gradient; None leaves it as it is.
        capture: `auto`, `true` or `false`: whether the step is compiled; see `mlframework.backend.capture`.
        memory_limit: what a meta-gradient may take, in GB beside the data; None: whatever there is. It bounds the
            tasks at a time, and where a single task takes more, inner steps are checkpointed. What is predicted, from
            one task and two, and what the first step takes are logged.
    """

    def __init__(
        self,
        meta_layer: MetaLayer,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        engine: str = "auto",
        chunk: int | str | None = None,
        clip: float | None = None,
        capture: str | bool = "false",
        memory_limit: float | None = None,
    ) -> None:
        if not (chunk in (None, "auto") or (isinstance(chunk, int) and chunk >= 1)):
            raise InvalidValue("chunk", chunk, "must be at least 1, or null for a choice by rule, or auto")
        if clip is not None and not clip > 0:
            raise InvalidValue("clip", clip, "must be above 0, or null for no clipping")
        if memory_limit is not None and not memory_limit > 0:
            raise InvalidValue("memory_limit", memory_limit, "must be above 0 GB, or null for none")
        if memory_limit is not None and isinstance(chunk, int):
            raise InvalidValue("memory_limit", memory_limit, f"chunk={chunk} is given as well: leave one out")
        self.memory_limit = memory_limit
        self.meta_layer, self.optimizer, self.scheduler = meta_layer, optimizer, scheduler
        self.engine, self.chunk, self.clip = engine, chunk, clip
        self.vectorises = meta_layer.engine == "vectorised"
        self.found: dict[int, ExecutionPlan] = {}
        self.capture = Capture(meta_layer, str(capture).lower(), clip)
        self.learned = learned_by(meta_layer)
        self.writes_buffers: bool | None = None

    def prepare(self, episode: Episode) -> None:
        """Chooses the engine, by trying it on an episode; finds out whether the base layer writes to its buffers."""
        self.writes_buffers = follow_parameters(self.meta_layer.base_layer, *episode)
        self.meta_layer.engine = choose_engine(self.meta_layer, episode, self.engine)
        self.vectorises = self.meta_layer.engine == "vectorised"

    def step(self, episode: Episode) -> Metrics:
        """One outer step; returns the means over tasks, the norm before clipping and the rate, detached scalar tensors.

        Raises:
            NotFinite: before the optimizer has moved anything.
        """
        if not self.meta_layer.training:
            self.meta_layer.train()
        self.meta_layer.outer_step = self.scheduler.last_epoch
        losses, _, by_name, conclusion = self.gradients(episode)
        assert conclusion is not None
        for name, grad in by_name.items():
            self.learned[name].grad = grad
        if not math.isfinite(conclusion.total):
            tasks = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
            raise NotFinite(f"the meta-{'loss' if tasks else 'gradient'} is not finite", tasks)
        check_rates(self.scheduler)
        lr = torch.tensor(self.scheduler.get_last_lr()[0])
        optimizer_step(self.optimizer)
        self.refresh_buffers(episode)
        self.scheduler.step()
        return {**conclusion.means, "meta_grad_norm": conclusion.norm, "lr": lr}

    def refresh_buffers(self, episode: Episode) -> None:
        """Lets buffers follow the parameters: tasks write to copies, so that only this writes to the base layer's own.

        Spectral norm takes one step of its power iteration.
        """
        if self.writes_buffers is None:
            self.writes_buffers = follow_parameters(self.meta_layer.base_layer, *episode)
        if self.writes_buffers:
            refresh(self.meta_layer.base_layer, episode.support)

    def gradients(self, episode: Episode) -> Gradients:
        """What the optimizer steps along, and what else a meta-batch comes to."""
        pace = self.pace(episode)
        if self.meta_layer.engine != pace.engine:  # a module takes its time to set what it holds
            self.meta_layer.engine = pace.engine
        captured = self.capture.wanted != "false"
        if captured and (pace.chunk is None or pace.chunk >= episode.num_tasks):
            found = self.capture(episode, whole=True)
            report_missing(self.meta_layer, [name for name in self.learned if name not in found.by_name])
            return found
        way = self.capture if captured else None
        losses, metrics = meta_gradient(
            self.meta_layer, episode, chunk=pace.chunk, gradients_of=way, learned=self.learned
        )
        by_name = {name: p.grad for name, p in self.learned.items() if p.grad is not None}
        return summarised(Gradients(losses, metrics, by_name), self.clip)

    def pace(self, episode: Episode) -> ExecutionPlan:
        """By which engine, and how many tasks at a time; chosen at the first meta-batch of a size."""
        if episode.num_tasks not in self.found and not isinstance(self.chunk, int):
            measured = self.chunk == "auto" and self.capture.wanted != "true"  # trying would mean compiling
            self.found[episode.num_tasks] = pace = (self.fastest_pace if measured else self.rule_pace)(episode)
            give_back()  # what the largest of those that were tried took
            if self.memory_limit is not None:
                log.info("memory: measured %.3g MB, %s by %d", self.peak(pace, episode) / 1e6, *pace)
        return self.chosen(episode.num_tasks)

    def chosen(self, num_tasks: int) -> ExecutionPlan:
        """The pace of meta-batches of a size, as the last one was stepped through."""
        if isinstance(self.chunk, int):
            return ExecutionPlan(self.meta_layer.engine, self.chunk)
        return self.found.get(num_tasks, ExecutionPlan(self.meta_layer.engine, None))

    def choices(self) -> dict[str, Any]:
        """The choices of this run that a stopwatch or a measurement made, for its checkpoint."""
        return {
            "settings": self.settings(),
            "paces": {tasks: tuple(pace) for tasks, pace in self.found.items()},
            "checkpoint_steps": getattr(self.meta_layer, "checkpoint_steps", False),
            "captured": dict(self.capture.decided),
        }

    def restore_choices(self, state: Mapping[str, Any]) -> None:
        """Takes over what an earlier process chose, unless it was asked for something else."""
        if state.get("settings") != self.settings():
            return
        self.capture.decided.update(state["captured"])
        if state["checkpoint_steps"]:
            setattr(self.meta_layer, "checkpoint_steps", True)  # noqa: B010 - only some algorithms have it
        self.found.update({tasks: ExecutionPlan(*pace) for tasks, pace in state["paces"].items()})
        for pace in self.found.values():
            self.meta_layer.engine = pace.engine

    def settings(self) -> list[Any]:
        """The settings that the choices depend on."""
        device = next(iter(self.learned.values())).device.type
        return [self.engine, self.chunk, self.memory_limit, self.capture.wanted, device]

    def rule_pace(self, episode: Episode) -> ExecutionPlan:
        """The pace by rule: it depends on the config, the shapes and the kind of device, never on a stopwatch.

        The vectorised engine takes all tasks at once, or as many as `memory_limit` allows. A loop takes all of a few
        tasks, which it then updates at once, else one; with a limit, or where it may be unrolled in a graph, one.
        docs/performance.md has the figures.
        """
        if self.capture.wanted == "true":
            return self.near_pace(episode)
        most = self.most_tasks(episode)
        return ExecutionPlan(self.meta_layer.engine, most if self.vectorises or self.loops_over_all(most) else 1)

    def loops_over_all(self, most: int) -> bool:
        """Whether a loop takes all tasks at once; their graphs take more memory than `most_tasks` knows of."""
        return most <= FEW and self.memory_limit is None and self.capture.wanted == "false"

    def near_pace(self, episode: Episode) -> ExecutionPlan:
        """That of compiled steps, which cannot be tried out at once: as many tasks as have the tensors of a unit near.

        On a GPU as many as `memory_limit` allows: what is small there is as fast as what is large. The tensors of an
        inner step are about the share of a meta-gradient's that the number of inner steps makes; those of two tasks
        tell more than those of one, which goes by ways of its own.
        """
        engine, steps = self.meta_layer.engine, max(getattr(self.meta_layer, "inner_steps", 1), 1)
        most = self.most_tasks(episode)
        if episode.device.type == "cpu":
            some = episode.tasks(slice(2))
            near = CACHE_BYTES * steps * some.num_tasks / max(self.peak(ExecutionPlan(engine, None), some), 1)
            most = max(min(most, int(near)), 1)
        # All parts of a meta-batch have one shape, for which there is one graph.
        return ExecutionPlan(engine, next(size for size in range(most, 0, -1) if episode.num_tasks % size == 0))

    def fastest_pace(self, episode: Episode) -> ExecutionPlan:
        """Tries what can be tried on a meta-batch; of what is about as fast, it takes what needs least memory."""
        most = self.most_tasks(episode)
        engines = get_args(Engine) if self.engine == "auto" and self.vectorises else (self.meta_layer.engine,)
        tried = {
            "loop": {1, most if self.loops_over_all(most) else 1},
            "vectorised": {1, most, *(size for size in CHUNKS if size < most)},
        }
        by_size = sorted((size, engine) for engine in engines for size in tried[engine])
        paces = [ExecutionPlan(engine, size) for size, engine in by_size]
        by_name = {f"{pace.engine} by {pace.chunk}": pace for pace in paces}
        ways = {name: functools.partial(self.try_out, pace, episode) for name, pace in by_name.items()}
        return by_name[fastest(f"{described(self.meta_layer)} of {shapes(episode)} by {', '.join(ways)}", ways)]

    def most_tasks(self, episode: Episode) -> int:
        """How many tasks at a time stay within the limit of memory; if it is none, inner steps are checkpointed: 1."""
        if self.memory_limit is None:
            return episode.num_tasks
        limit = self.memory_limit * 1e9
        one, two = (
            self.peak(ExecutionPlan(self.meta_layer.engine, None), episode.tasks(slice(count))) for count in (1, 2)
        )
        each = max(two - one, 1)
        most = min(1 + int((limit - one) // each), episode.num_tasks)
        if most < 1 and getattr(self.meta_layer, "checkpoint_steps", True) is False:
            log.info("memory: a task takes %.3g MB, so inner steps are checkpointed", one / 1e6)
            setattr(self.meta_layer, "checkpoint_steps", True)  # noqa: B010 - only some algorithms have it
            return self.most_tasks(episode)
        if most < 1:
            log.warning("memory: a single task takes %.3g MB, above memory_limit: it is taken alone", one / 1e6)
        most = max(most, 1)
        log.info("memory: predicted %.3g MB for %d tasks at a time", (one + (most - 1) * each) / 1e6, most)
        return most

    def peak(self, pace: ExecutionPlan, episode: Episode) -> float:
        """The most bytes that the tensors of a meta-gradient take."""
        self.try_out(pace, episode)  # gradients are there before
        with counted_references(), PeakMemory() as memory:
            self.try_out(pace, episode)
        return memory.peak

    def try_out(self, pace: ExecutionPlan, episode: Episode) -> None:
        """Takes a meta-gradient, and leaves everything as it was but the gradients."""
        before, self.meta_layer.engine = self.meta_layer.engine, pace.engine
        try:
            with fork_rng(episode.device):
                meta_gradient(self.meta_layer, episode, chunk=pace.chunk)
        finally:
            self.meta_layer.engine = before


@contextmanager
def counted_references() -> Iterator[None]:
    """Turns the garbage collector off: when it frees the tensors of a cycle depends on what else the process did."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def described(meta_layer: MetaLayer) -> str:
    """What the time of a step depends on, as far as it is the algorithm's."""
    parts = [type(module).__name__ for module in meta_layer.modules()]
    sizes = [tuple(p.shape) for p in meta_layer.parameters()]
    now = ("outer_step", "engine", "training")  # the state of a run at hand: a resumed run asks the same question
    numbers = {k: v for k, v in vars(meta_layer).items() if isinstance(v, (int, float, str)) and k not in now}
    text = f"{parts} {sizes} {sorted(numbers.items())} {type(getattr(meta_layer, 'meta_gradient', None)).__name__}"
    return f"{type(meta_layer).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def shapes(episode: Episode) -> str:
    found = " ".join(f"{tuple(leaf.shape)} {leaf.dtype}".replace("torch.", "") for part in episode for leaf in part)
    return f"{found} on {name_of(episode.device)}"
