"""How a meta-batch is gone through: by which engine, and how many tasks at a time."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from mlframework.backend.algorithm import Algorithm, Engine
from mlframework.backend.capture import Capture
from mlframework.backend.engine import choose_engine
from mlframework.backend.machine import PeakMemory, fastest, fork_rng, give_back
from mlframework.episode import Episode
from mlframework.errors import InvalidValue
from mlframework.screen import stage

__all__ = ["ExecutionPlan", "Planner"]

log = logging.getLogger(__name__)

#: Tasks at a time, beside one and all, that `chunk=auto` tries.
CHUNKS = (4, 16, 64)

#: The most tasks that a loop takes at a time: stacked updates of all tasks are faster, but keep every task's graph.
LOOP_TASKS = 16

#: Bytes of tensors of one inner step up to which more tasks at a time made compiled steps faster on a CPU; beyond it,
#: they gain some per cent at most, and take memory.
CACHE_BYTES = 9e6


class ExecutionPlan(NamedTuple):
    """How a meta-batch is gone through."""

    engine: Engine
    chunk: int | None  # tasks at a time; None: all


class Planner:
    """Chooses an execution plan for each size of a meta-batch, at the first one of that size.

    Args:
        meta_layer: the algorithm; its `engine` is set.
        gradient: takes a meta-gradient of an episode, so many tasks at a time (`chunk`), and leaves it in `.grad`.
        capture: compiles steps.
        engine: `auto`, `vectorised` or `loop`; see `mlframework.backend.engine`.
        chunk: tasks at a time. None: by rule, see `by_rule`. `auto`: a stopwatch chooses, with `engine=auto` the engine
            too; its choice differs from machine to machine, and so do the bits.
        memory_limit: the most that a meta-gradient may take, in GB beside the data; None: no limit. It bounds the tasks
            at a time; where a single task takes more, inner steps are checkpointed.
    """

    def __init__(
        self,
        meta_layer: Algorithm,
        gradient: Callable[..., object],
        capture: Capture,
        *,
        engine: str,
        chunk: int | str | None,
        memory_limit: float | None,
    ) -> None:
        if not (chunk in (None, "auto") or (isinstance(chunk, int) and chunk >= 1)):
            raise InvalidValue("chunk", chunk, "must be at least 1, or null for a choice by rule, or auto")
        if memory_limit is not None and not memory_limit > 0:
            raise InvalidValue("memory_limit", memory_limit, "must be above 0 GB, or null for none")
        if memory_limit is not None and isinstance(chunk, int):
            raise InvalidValue("memory_limit", memory_limit, f"chunk={chunk} is given as well: leave one out")
        self.meta_layer, self.gradient, self.capture = meta_layer, gradient, capture
        self.engine, self.chunk, self.memory_limit = engine, chunk, memory_limit
        self.vectorises = meta_layer.engine == "vectorised"
        self.plans: dict[int, ExecutionPlan] = {}

    def prepare(self, episode: Episode) -> None:
        """Chooses the engine by trying it on an episode."""
        self.meta_layer.engine = choose_engine(self.meta_layer, episode, self.engine)
        self.vectorises = self.meta_layer.engine == "vectorised"

    def follow(self, episode: Episode) -> ExecutionPlan:
        """The plan for a meta-batch, chosen if it is the first of its size; the meta layer's engine is set to it."""
        if episode.num_tasks not in self.plans and not isinstance(self.chunk, int):
            measured = self.chunk == "auto" and self.capture.wanted != "true"  # trying would mean compiling
            with stage("measuring"):
                self.plans[episode.num_tasks] = plan = (self.by_stopwatch if measured else self.by_rule)(episode)
            give_back()  # the memory of the largest plan that was tried
            if self.memory_limit is not None:
                log.info("memory: measured %.3g MB, %s by %d", self.peak(plan, episode) / 1e6, *plan)
        plan = self.plan_of(episode.num_tasks)
        if self.meta_layer.engine != plan.engine:  # setting an attribute of a module takes a while
            self.meta_layer.engine = plan.engine
        return plan

    def plan_of(self, num_tasks: int) -> ExecutionPlan:
        """The plan for meta-batches of a size."""
        given = self.chunk if isinstance(self.chunk, int) else None
        return self.plans.get(num_tasks, ExecutionPlan(self.meta_layer.engine, given))

    def by_rule(self, episode: Episode) -> ExecutionPlan:
        """The plan by rule: it depends on the config, the shapes and the kind of device, never on a stopwatch.

        The vectorised engine takes all tasks at once, or as many as `memory_limit` allows. A loop takes all of a few
        tasks, whose updates are then one operation, else one; with a limit, or where it may be compiled, one.
        """
        if self.capture.wanted == "true":
            return self.for_compiled_steps(episode)
        most = self.most_tasks(episode)
        return ExecutionPlan(self.meta_layer.engine, most if self.vectorises or self.loops_over_all(most) else 1)

    def loops_over_all(self, most: int) -> bool:
        """Whether a loop takes all tasks at once; `most_tasks` knows nothing of the memory of all their graphs."""
        return most <= LOOP_TASKS and self.memory_limit is None and self.capture.wanted == "false"

    def for_compiled_steps(self, episode: Episode) -> ExecutionPlan:
        """The most tasks whose working set for one inner step fits in the cache; on a GPU all that memory allows.

        One inner step takes about the peak memory of a meta-gradient divided by the number of steps. Two tasks are
        measured, because a single one takes other code paths.
        """
        engine, steps = self.meta_layer.engine, max(getattr(self.meta_layer, "inner_steps", 1), 1)
        most = self.most_tasks(episode)
        if episode.device.type == "cpu":
            some = episode.tasks(slice(2))
            fit = CACHE_BYTES * steps * some.num_tasks / max(self.peak(ExecutionPlan(engine, None), some), 1)
            most = max(min(most, int(fit)), 1)
        # All chunks of a meta-batch have one shape, and so one graph.
        return ExecutionPlan(engine, next(size for size in range(most, 0, -1) if episode.num_tasks % size == 0))

    def by_stopwatch(self, episode: Episode) -> ExecutionPlan:
        """The fastest plan for a meta-batch; of several that are about as fast, the one with the fewest tasks."""
        most = self.most_tasks(episode)
        engines = get_args(Engine) if self.engine == "auto" and self.vectorises else (self.meta_layer.engine,)
        sizes = {
            "loop": {1, most if self.loops_over_all(most) else 1},
            "vectorised": {1, most, *(size for size in CHUNKS if size < most)},
        }
        by_size = sorted((size, engine) for engine in engines for size in sizes[engine])
        plans = {f"{engine} by {size}": ExecutionPlan(engine, size) for size, engine in by_size}
        candidates = {name: functools.partial(self.try_out, plan, episode) for name, plan in plans.items()}
        return plans[fastest(candidates)]

    def most_tasks(self, episode: Episode) -> int:
        """The tasks at a time that stay within the memory limit; if not even one does, inner steps are checkpointed."""
        if self.memory_limit is None:
            return episode.num_tasks
        limit = self.memory_limit * 1e9
        whole = ExecutionPlan(self.meta_layer.engine, None)
        one, two = (self.peak(whole, episode.tasks(slice(count))) for count in (1, 2))
        each = max(two - one, 1)
        most = min(1 + int((limit - one) // each), episode.num_tasks)
        if most < 1 and getattr(self.meta_layer, "checkpoint_steps", True) is False:
            log.info("memory: a task takes %.3g MB, so inner steps are checkpointed", one / 1e6)
            self.checkpoint_steps()
            return self.most_tasks(episode)
        if most < 1:
            log.warning("memory: a single task takes %.3g MB, above memory_limit: it is taken alone", one / 1e6)
        most = max(most, 1)
        log.info("memory: predicted %.3g MB for %d tasks at a time", (one + (most - 1) * each) / 1e6, most)
        return most

    def checkpoint_steps(self) -> None:
        setattr(self.meta_layer, "checkpoint_steps", True)  # noqa: B010 - only some algorithms have it

    def peak(self, plan: ExecutionPlan, episode: Episode) -> float:
        """The most bytes that the tensors of a meta-gradient hold."""
        self.try_out(plan, episode)  # so that the memory of `.grad` is there before
        # When the garbage collector frees a cycle depends on everything else that the process did.
        enabled = gc.isenabled()
        gc.disable()
        try:
            with PeakMemory() as memory:
                self.try_out(plan, episode)
        finally:
            if enabled:
                gc.enable()
        return memory.peak

    def try_out(self, plan: ExecutionPlan, episode: Episode) -> None:
        """Takes a meta-gradient, and leaves everything but `.grad` as it was."""
        before, self.meta_layer.engine = self.meta_layer.engine, plan.engine
        try:
            with fork_rng(episode.device):
                self.gradient(episode, chunk=plan.chunk)
        finally:
            self.meta_layer.engine = before

    def choices(self) -> dict[str, Any]:
        """The choices of this run that a stopwatch or a measurement made, for its checkpoint."""
        return {
            "settings": self.settings(),
            "plans": {tasks: tuple(plan) for tasks, plan in self.plans.items()},
            "checkpoint_steps": getattr(self.meta_layer, "checkpoint_steps", False),
            "captured": dict(self.capture.decided),
        }

    def restore_choices(self, state: Mapping[str, Any]) -> None:
        """Takes over the choices of an earlier process, unless its settings were others."""
        if state.get("settings") != self.settings():
            return
        self.capture.decided.update(state["captured"])
        if state["checkpoint_steps"]:
            self.checkpoint_steps()
        self.plans.update({tasks: ExecutionPlan(*plan) for tasks, plan in state["plans"].items()})
        for plan in self.plans.values():
            self.meta_layer.engine = plan.engine

    def settings(self) -> list[Any]:
        """The settings that the choices depend on."""
        tensor = next(self.meta_layer.parameters(), None)  # of an algorithm that has any
        device = None if tensor is None else tensor.device.type
        return [self.engine, self.chunk, self.memory_limit, self.capture.wanted, device]
