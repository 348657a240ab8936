"""An outer step as compiled graphs: losses, metrics and meta-gradients with little or no python in between.

A step of few operations becomes one graph; a longer one is compiled in the units that it repeats, so that compiling
takes as long for fifty inner steps as for one. Before either is used, what it gives for the episode at hand is compared
with the ordinary, eager way; what cannot be traced or compiled, or differs, is given up for this run, and one line says
why.
"""

from __future__ import annotations

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

from mlframework.compiled import Gradients, NotCapturable, Units, WholeStep, eager_gradients
from mlframework.episode import Episode
from mlframework.errors import InvalidValue, nearest
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["CHOICES", "Capture"]

CHOICES = ("auto", "true", "false")

#: Relative difference of a whole meta-gradient from the eager one that rounding can explain.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}

#: Seconds that tracing and compiling are expected to take where nothing is cached, and what they make of a step.
EXPECTED_SECONDS, EXPECTED_SPEEDUP = 60.0, 1.5

#: Operations of a step up to which it is one graph.
MOST_OPERATIONS = 1500

#: Eager steps by whose median `auto` decides.
TIMED_STEPS = 5

#: Shapes of episodes for which graphs are kept; others take their steps eagerly.
MOST_SHAPES = 8

log = logging.getLogger(__name__)

#: How the meta-gradient of an episode is found.
Way = Callable[[MetaLayer, Episode], Gradients]


class Capture:
    """Takes meta-gradients from compiled graphs where that pays, else eagerly.

    Args:
        meta_layer: the algorithm, in training mode.
        wanted: `true`: at the first episode of each shape; `false`: never; `auto`: once `steps_left` is known and large
            enough that the time saved is expected to exceed that of compiling.
    """

    def __init__(self, meta_layer: MetaLayer, wanted: str) -> None:
        if wanted not in CHOICES:
            raise InvalidValue("capture", wanted, f"must be one of {', '.join(CHOICES)}{nearest(wanted, CHOICES)}")
        self.meta_layer, self.wanted = meta_layer, wanted
        self.steps_left = 0
        self.ways: dict[Any, Way] = {}
        self.units = Units(meta_layer)
        self.times: dict[Any, list[float]] = {}

    def __call__(self, episode: Episode) -> Gradients:
        """The meta-gradient of an episode."""
        if self.wanted == "false":
            return eager_gradients(self.meta_layer, episode)
        key = tuple((leaf.shape, leaf.dtype, leaf.device) for part in episode for leaf in part)
        if key not in self.ways and self.pays(key):
            self.ways[key] = self.captured(episode)
        if key in self.ways:
            return self.ways[key](self.meta_layer, episode)
        began = time.perf_counter()
        found = eager_gradients(self.meta_layer, episode)
        self.times.setdefault(key, []).append(time.perf_counter() - began)
        return found

    def pays(self, key: Any) -> bool:
        """Whether compiling for a shape is worth its time, as far as can be known before."""
        if self.wanted == "true":
            return True
        times = self.times.get(key, [])
        if len(times) <= TIMED_STEPS:
            return False
        saved = statistics.median(times[1 : TIMED_STEPS + 1]) * (1 - 1 / EXPECTED_SPEEDUP)  # the first one warms up
        return self.steps_left * saved > EXPECTED_SECONDS

    def captured(self, episode: Episode) -> Way:
        """A compiled way that was seen to give what the eager one gives; else that one, and a line that says why."""
        if len(self.ways) >= MOST_SHAPES:
            log.warning("capture: an episode of yet another shape; those of %d are compiled: eager", MOST_SHAPES)
            return eager_gradients
        try:
            eager_seconds, eager = timed(lambda: eager_gradients(self.meta_layer, episode))
            began = time.perf_counter()
            way = self.compiled(episode)
            way(self.meta_layer, episode)
            compiling = time.perf_counter() - began
            seconds, found = timed(lambda: way(self.meta_layer, episode))
            self.check(way, episode, found, eager)
        except Exception as error:  # tracing and compiling fail with many kinds; the eager step is there for all
            why = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...") or type(error).__name__
            log.warning("capture: eager steps instead: %s", why)
            return eager_gradients
        gain = eager_seconds - seconds
        pays = f"pays after {compiling / gain:.0f} steps" if gain > 0 else "no gain"
        speed = f"{eager_seconds * 1e3:.3g} -> {seconds * 1e3:.3g} ms for a meta-gradient"
        log.info("capture: compiled in %.1f s; %s (%s)", compiling, speed, pays)
        return way if gain > 0 or self.wanted == "true" else eager_gradients

    def check(self, way: Way, episode: Episode, found: Gradients, eager: Gradients) -> None:
        """Raises `NotCapturable` where a compiled way gives something else than the eager one.

        Where rounding turns over a rectifier or a maximum, a gradient jumps, by per cents of the whole; so what differs
        is given another chance, with inputs that are a little larger or smaller.
        """
        off = difference(found, eager)
        for scale in (1.01, 0.99):
            if off <= TOLERANCES.get(eager.losses.dtype, 1e-2):
                return
            near = scaled(episode, scale)
            off = difference(way(self.meta_layer, near), eager_gradients(self.meta_layer, near))
        if not off <= TOLERANCES.get(eager.losses.dtype, 1e-2):
            raise NotCapturable(f"the graph's meta-gradient is {off:.1e} off the eager one")

    def compiled(self, episode: Episode) -> Way:
        """The whole step as one graph, or its units where it is long and has any."""
        gradient = getattr(self.meta_layer, "meta_gradient", None)
        if not getattr(gradient, "can_be_captured", True):
            raise NotCapturable(f"compiled and eager steps of {type(gradient).__name__} were seen to drift apart")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            if operations(self.meta_layer, episode) > MOST_OPERATIONS:
                self.by_units(self.meta_layer, episode)
                if self.units.units:
                    return self.by_units
            return WholeStep(self.meta_layer, episode)

    def by_units(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        """The meta-gradient of a step whose units are compiled."""
        before, meta_layer.run = meta_layer.run, self.units
        try:
            return eager_gradients(meta_layer, episode)
        finally:
            meta_layer.run = before


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


def timed(function: Callable[[], Gradients]) -> tuple[float, Gradients]:
    """The shorter of two runs, in seconds, and what came of the last."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = function()
        seconds.append(time.perf_counter() - began)
    return min(seconds), found


def scaled(episode: Episode, scale: float) -> Episode:
    """The same tasks with their inputs, where these are no tokens, times a number."""
    support, query = (part._replace(x=part.x * scale if part.x.is_floating_point() else part.x) for part in episode)
    return Episode(support, query)


def difference(found: Gradients, eager: Gradients) -> float:
    """How far losses and meta-gradient are from the eager ones, as a share of their norm.

    Of the whole, because some parameters' gradients are zero but for rounding, as a bias before a batch norm.

    Raises:
        NotCapturable: they are not of the same parameters.
    """
    if found.by_name.keys() != eager.by_name.keys():
        raise NotCapturable("the graph has gradients for other parameters than the eager step")

    def whole(gradients: Gradients) -> Tensor:
        return torch.cat([gradients.losses, *(grad.flatten() for grad in gradients.by_name.values())])

    truth = whole(eager)
    return ((whole(found) - truth).norm() / truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)).item()
