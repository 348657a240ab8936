"""An outer step as compiled graphs: losses, metrics and meta-gradients with little or no Python in between.

A step of few operations becomes one graph, a longer one is compiled in regions; see `mlframework.backend.regions`.
Before it is used, its results are compared with the eager ones. A step that cannot be compiled, or that differs, stays
eager for this run, and one line says why.
"""

from __future__ import annotations

import functools
import logging
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlframework.backend.algorithm import Algorithm, End, GradientFn, Gradients, Held, eager_gradients
from mlframework.backend.cuda_graphs import as_cuda_graph
from mlframework.backend.forward import compiled_by
from mlframework.backend.graph_cache import GraphCache
from mlframework.backend.machine import PeakMemory, give_back, synchronise, timed
from mlframework.backend.regions import NotCompiled, RegionCompiler, compile_step
from mlframework.backend.verify import Undecided, are_small, differences, in_float64, verify_against_eager
from mlframework.episode import Episode
from mlframework.errors import InvalidValue, nearest
from mlframework.screen import stage

__all__ = ["CHOICES", "Capture"]

CHOICES = ("auto", "true", "false")

#: Seconds that tracing and compiling are expected to take with an empty cache, and the expected speedup of a step.
EXPECTED_SECONDS, EXPECTED_SPEEDUP = 60.0, 1.5

#: Operations of a step up to which it is one graph.
MOST_OPERATIONS = 1500

#: Eager steps by whose median `auto` decides.
TIMED_STEPS = 5

#: Shapes of episodes for which graphs are kept; others take their steps eagerly.
MOST_SHAPES = 8

log = logging.getLogger(__name__)


class Capture:
    """Takes meta-gradients from compiled graphs where that pays, else eagerly.

    Args:
        meta_layer: the algorithm, in training mode.
        wanted: `true`: at the first episode of each shape; `false`: never; `auto`: once `steps_left` are so many that
            they are expected to save more time than compiling takes.
        finish: turns the gradients of a whole meta-batch into the optimizer's; its `repr` tells it from others.
        cache: graphs that this process or others have compiled.
    """

    def __init__(
        self, meta_layer: Algorithm, wanted: str, finish: End | None = None, cache: GraphCache | None = None
    ) -> None:
        if wanted not in CHOICES:
            raise InvalidValue("capture", wanted, f"must be one of {', '.join(CHOICES)}{nearest(wanted, CHOICES)}")
        self.meta_layer, self.wanted, self.finish = meta_layer, wanted, finish
        self.steps_left = 0
        #: Whether Ctrl-C was pressed, which ends a compiler, too.
        self.interrupted: Callable[[], bool] = lambda: False
        self.steps: dict[Any, GradientFn] = {}
        self.cache = cache or GraphCache()
        self.regions = RegionCompiler(meta_layer, self.cache)
        self.times: dict[Any, list[float]] = {}
        #: For each shape whether its steps are compiled, as this process or an earlier one decided.
        self.decided: dict[str, bool] = {}

    def __call__(self, episode: Episode, whole: bool = False) -> Gradients:
        """The meta-gradient of an episode; that of a whole meta-batch is finished."""
        key, end = (whole, *layout_of(episode)), self.finish if whole else None
        if (step := self.steps.get(key)) is None and self.pays(key):
            step = self.choose(key, episode, end)
        if step is not None:
            try:
                return step(self.meta_layer, episode)
            except NotCompiled:  # the step calls other functions than those that were checked
                return self.choose(key, episode, end)(self.meta_layer, episode)
        began = time.perf_counter()
        found = ended(eager_gradients, end)(self.meta_layer, episode)
        synchronise()
        self.times.setdefault(key, []).append(time.perf_counter() - began)
        return found

    def pays(self, key: Any) -> bool:
        """Whether compiling for a shape is expected to be worth its time."""
        if self.wanted == "true" or (self.wanted == "auto" and str(key) in self.decided):
            return True
        times = self.times.get(key, [])
        if len(times) <= TIMED_STEPS:
            return False
        saved = statistics.median(times[1 : TIMED_STEPS + 1]) * (1 - 1 / EXPECTED_SPEEDUP)  # the first one warms up
        return self.steps_left * saved > EXPECTED_SECONDS

    def choose(self, key: Any, episode: Episode, end: End | None) -> GradientFn:
        """Compiles the step for episodes of a shape, or settles on the eager one."""
        self.steps.pop(key, None)
        before = self.decided.get(str(key)) if self.wanted == "auto" else None
        must = self.wanted == "true" or before is True
        step = None if before is False else self.compiled_step(episode, end, must=must)
        self.decided[str(key)] = step is not None
        self.steps[key] = step or ended(eager_gradients, end)
        give_back()  # the memory of compiling and checking
        return self.steps[key]

    def compiled_step(self, episode: Episode, end: End | None, *, must: bool) -> GradientFn | None:
        """A compiled step that was seen to give the eager one's results; else None, and a line that says why.

        With `must` it is taken though it saves no time.
        """
        if len(self.steps) >= MOST_SHAPES:
            log.warning("capture: an episode of yet another shape; those of %d are compiled: eager", MOST_SHAPES)
            return None
        eager = ended(eager_gradients, end)
        try:
            with stage("compiling the step"), self.cache.checked():
                eager_seconds = min(timed(lambda: eager(self.meta_layer, episode)) for _ in range(2))
                began = time.perf_counter()
                step = as_cuda_graph(self.build(episode, end), self.meta_layer, episode)
                step(self.meta_layer, episode)
                compiling = time.perf_counter() - began
                seconds = min(timed(lambda: step(self.meta_layer, episode)) for _ in range(2))
                self.check(step, episode, end)
        except Exception as error:  # tracing and compiling fail with many kinds; the eager step is there for all
            if self.interrupted():
                raise KeyboardInterrupt from error
            if self.cache.forget():  # perhaps a stored graph was of something that only seemed to be the same
                self.regions.regions.clear()
                return self.compiled_step(episode, end, must=must)
            why = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...") or type(error).__name__
            log.warning("capture: eager steps instead: %s", why)
            return None
        gain = eager_seconds - seconds
        pays = f"pays after {compiling / gain:.0f} steps" if gain > 0 else "no gain"
        speed = f"{eager_seconds * 1e3:.3g} -> {seconds * 1e3:.3g} ms for a meta-gradient"
        log.info("capture: compiled in %.1f s; %s (%s)", compiling, speed, pays)
        return step if gain > 0 or must else None

    def check(self, step: GradientFn, episode: Episode, end: End | None) -> None:
        """Raises `NotCapturable` where a compiled step gives other results than the eager one.

        Where float32 cannot decide, the same step compiled in float64 has to agree. If it did in an earlier process,
        and float32 differs about as much as it did then, it is not compiled in float64 again.
        """
        eager = ended(eager_gradients, end)
        try:
            verify_against_eager(self.meta_layer, step, eager, episode)
            return
        except Undecided:
            off = differences(step(self.meta_layer, episode), eager(self.meta_layer, episode))

        def agreed() -> Tensor:
            """The differences in float32 of a step that agrees in float64."""
            double, same = in_float64(self.meta_layer, episode)
            step = as_cuda_graph(Capture(double, "true", cache=self.cache).build(same, end), double, same)
            verify_against_eager(double, step, eager, same)
            return off

        then = self.cache.get(agreed, self.meta_layer, "in float64", layout_of(episode), repr(end))
        if not are_small(off, torch.float32, then):
            agreed()

    def build(self, episode: Episode, end: End | None) -> GradientFn:
        """The whole step as one graph; or in regions, if it has any, where it is long or branches on values."""
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # takes a second to import

        step = functools.partial(compile_step, self.meta_layer, episode, ended(eager_gradients, end))
        with PeakMemory() as used:
            eager_gradients(self.meta_layer, episode)
        long = used.operations > MOST_OPERATIONS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            if not (long and self.has_regions(episode)):
                try:
                    graph = self.cache.get(step, self.meta_layer, "whole step", layout_of(episode), repr(end))
                    held = Held(self.meta_layer)
                    return lambda _, episode: graph(*held(), *episode.support, *episode.query)
                except GuardOnDataDependentSymNode:
                    if long or not self.has_regions(episode):
                        raise
            return ended(self.in_regions, end)

    def has_regions(self, episode: Episode) -> bool:
        """Whether a step has regions; they are then compiled."""
        self.in_regions(self.meta_layer, episode)
        return bool(self.regions.regions)

    def in_regions(self, meta_layer: Algorithm, episode: Episode) -> Gradients:
        """The meta-gradient, its regions compiled."""
        with compiled_by(self.regions):
            return eager_gradients(meta_layer, episode)


def ended(step: GradientFn, end: End | None) -> GradientFn:
    """A step, of a whole meta-batch followed by its end."""
    return step if end is None else lambda meta_layer, episode: end(step(meta_layer, episode))


def layout_of(episode: Episode) -> tuple[Any, ...]:
    """The properties of an episode that a graph depends on."""
    return tuple([(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for part in episode for leaf in part])
