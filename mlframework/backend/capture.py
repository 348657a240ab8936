"""An outer step as compiled graphs: losses, metrics and meta-gradients with little or no python in between.

A step of few operations becomes one graph; a longer one is compiled in the units that it repeats, so that compiling
takes as long for fifty inner steps as for one. Before either is used, what it gives for the episode at hand, and for
another, is compared with the ordinary, eager way; what cannot be traced or compiled, or differs, is given up for this
run, and one line says why.
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
from torch.utils._python_dispatch import TorchDispatchMode

from mlframework.backend.allocator import give_back
from mlframework.backend.compiled import End, Gradients, WholeStep, averaged, eager_gradients, summarised
from mlframework.backend.cuda_graphs import recorded
from mlframework.backend.devices import synchronise
from mlframework.backend.forward import compiled_by
from mlframework.backend.graph_cache import GraphCache
from mlframework.backend.regions import NotCompiled, Units
from mlframework.backend.stopwatch import timed
from mlframework.backend.verify import (
    SCATTER_FACTOR,
    TOLERANCES,
    Undecided,
    Way,
    differences,
    in_float64,
    verify_against_eager,
)
from mlframework.episode import Episode
from mlframework.errors import InvalidValue, nearest
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["CHOICES", "Capture"]

CHOICES = ("auto", "true", "false")

#: Seconds that tracing and compiling are expected to take where nothing is cached, and what they make of a step.
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
        wanted: `true`: at the first episode of each shape; `false`: never; `auto`: once `steps_left` is known and large
            enough that the time saved is expected to exceed that of compiling.
        clip: the largest norm of the gradient of a whole meta-batch; see `summarised`.
        kept: what has been compiled, here or in other processes.
    """

    def __init__(
        self, meta_layer: MetaLayer, wanted: str, clip: float | None = None, kept: GraphCache | None = None
    ) -> None:
        if wanted not in CHOICES:
            raise InvalidValue("capture", wanted, f"must be one of {', '.join(CHOICES)}{nearest(wanted, CHOICES)}")
        self.meta_layer, self.wanted, self.clip = meta_layer, wanted, clip
        self.steps_left = 0
        #: Whether Ctrl-C was pressed, which ends a compiler, too.
        self.interrupted: Callable[[], bool] = lambda: False
        self.ways: dict[Any, Way] = {}
        self.kept = kept or GraphCache()
        self.units = Units(meta_layer, self.kept)
        self.times: dict[Any, list[float]] = {}
        #: For each shape whether its steps are compiled, as this process or an earlier one decided.
        self.decided: dict[str, bool] = {}

    def __call__(self, episode: Episode, whole: bool = False) -> Gradients:
        """The meta-gradient of an episode; if that is a whole meta-batch, with its conclusion."""
        key = whole, *looks(episode)
        if key not in self.ways and self.pays(key):
            self.compile(key, episode, whole)
        if key in self.ways:
            try:
                return self.ways[key](self.meta_layer, episode)
            except NotCompiled:  # a step that calls other functions than those that were checked
                self.compile(key, episode, whole)
                return self.ways[key](self.meta_layer, episode)
        began = time.perf_counter()
        found = self.eagerly(whole)(self.meta_layer, episode)
        synchronise()
        self.times.setdefault(key, []).append(time.perf_counter() - began)
        return found

    def compile(self, key: Any, episode: Episode, whole: bool) -> None:
        """Finds the way for episodes of a shape."""
        self.ways.pop(key, None)
        before = self.decided.get(str(key)) if self.wanted == "auto" else None
        way = None if before is False else self.captured(episode, whole, must=self.wanted == "true" or before is True)
        self.decided[str(key)] = way is not None
        self.ways[key] = self.eagerly(whole) if way is None else way
        give_back()  # what compiling and checking took

    def end(self, whole: bool) -> End | None:
        return (lambda found: summarised(averaged(found), self.clip)) if whole else None

    def eagerly(self, whole: bool) -> Way:
        return ended(eager_gradients, self.end(whole))

    def pays(self, key: Any) -> bool:
        """Whether compiling for a shape is worth its time, as far as can be known before."""
        if self.wanted == "true" or (self.wanted == "auto" and str(key) in self.decided):
            return True
        times = self.times.get(key, [])
        if len(times) <= TIMED_STEPS:
            return False
        saved = statistics.median(times[1 : TIMED_STEPS + 1]) * (1 - 1 / EXPECTED_SPEEDUP)  # the first one warms up
        return self.steps_left * saved > EXPECTED_SECONDS

    def captured(self, episode: Episode, whole: bool, *, must: bool) -> Way | None:
        """A compiled way that was seen to give the eager one's results; else None, and a line that says why.

        Args:
            episode, whole: see `__call__`.
            must: whether a compiled way is taken though it saves no time.
        """
        eagerly = self.eagerly(whole)
        if len(self.ways) >= MOST_SHAPES:
            log.warning("capture: an episode of yet another shape; those of %d are compiled: eager", MOST_SHAPES)
            return None
        try:
            with self.kept.checked():
                eager_seconds = seconds_of(lambda: eagerly(self.meta_layer, episode))
                began = time.perf_counter()
                way = recorded(self.compiled(episode, whole), self.meta_layer, episode)
                way(self.meta_layer, episode)
                compiling = time.perf_counter() - began
                seconds = seconds_of(lambda: way(self.meta_layer, episode))
                self.check(way, eagerly, episode, whole)
        except Exception as error:  # tracing and compiling fail with many kinds; the eager step is there for all
            if self.interrupted():
                raise KeyboardInterrupt from error
            if self.kept.forget():  # of something that only seemed to be the same, perhaps
                self.units.units.clear()
                return self.captured(episode, whole, must=must)
            why = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...") or type(error).__name__
            log.warning("capture: eager steps instead: %s", why)
            return None
        gain = eager_seconds - seconds
        pays = f"pays after {compiling / gain:.0f} steps" if gain > 0 else "no gain"
        speed = f"{eager_seconds * 1e3:.3g} -> {seconds * 1e3:.3g} ms for a meta-gradient"
        log.info("capture: compiled in %.1f s; %s (%s)", compiling, speed, pays)
        return way if gain > 0 or must else None

    def check(self, way: Way, eagerly: Way, episode: Episode, whole: bool) -> None:
        """Raises `NotCapturable` where a compiled way gives something else than the eager one.

        Where float32 cannot tell, the same step compiled in float64 has to agree; but for one that did in an earlier
        process, and differs in float32 about as it did then.
        """
        try:
            verify_against_eager(self.meta_layer, way, eagerly, episode)
        except Undecided:
            off = differences(way(self.meta_layer, episode), eagerly(self.meta_layer, episode))
            judge = functools.partial(self.judged_in_float64, off, episode, whole)
            then = self.kept.get(judge, self.meta_layer, "in float64", looks(episode), whole, self.clip)
            limits = torch.tensor(TOLERANCES[torch.float32])
            if not bool((off <= torch.maximum(limits, SCATTER_FACTOR * then)).all()):
                judge()

    def judged_in_float64(self, off: Tensor, episode: Episode, whole: bool) -> Tensor:
        """How far a way is off in float32, if it agrees in float64; else raises `NotCapturable`."""
        double, same = in_float64(self.meta_layer, episode)
        way = recorded(Capture(double, "true", self.clip, self.kept).compiled(same, whole), double, same)
        verify_against_eager(double, way, self.eagerly(whole), same)
        return off

    def compiled(self, episode: Episode, whole: bool) -> Way:
        """The whole step as one graph, or its units where it is long, or branches on values, and has any."""
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # takes a second to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            if operations(self.meta_layer, episode) <= MOST_OPERATIONS:
                try:
                    return self.whole_step(episode, whole)
                except GuardOnDataDependentSymNode:
                    if not self.has_units(episode):
                        raise
            elif not self.has_units(episode):
                return self.whole_step(episode, whole)
            return ended(self.by_units, self.end(whole))

    def whole_step(self, episode: Episode, whole: bool) -> WholeStep:
        build = functools.partial(WholeStep, self.meta_layer, episode, self.end(whole))
        return self.kept.get(build, self.meta_layer, "whole step", looks(episode), whole, self.clip)

    def has_units(self, episode: Episode) -> bool:
        """Whether there is something in a step that can be compiled by itself; it then is."""
        self.by_units(self.meta_layer, episode)
        return bool(self.units.units)

    def by_units(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        """The meta-gradient of a step whose units are compiled."""
        with compiled_by(self.units):
            return eager_gradients(meta_layer, episode)


def looks(episode: Episode) -> tuple[Any, ...]:
    """What a graph takes for granted of an episode."""
    return tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for part in episode for leaf in part)


def ended(way: Way, end: End | None) -> Way:
    """A way with what follows from the gradients."""
    return way if end is None else lambda meta_layer, episode: end(way(meta_layer, episode))


class Operations(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(meta_layer: MetaLayer, episode: Episode) -> int:
    """How many operations an eager meta-gradient takes."""
    with Operations() as counter:
        eager_gradients(meta_layer, episode)
    return counter.count


def seconds_of(function: Callable[[], Gradients]) -> float:
    """The shorter of two runs."""
    return min(timed(function) for _ in range(2))
