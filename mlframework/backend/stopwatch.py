"""The fastest of several candidates, by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from mlframework.backend.devices import synchronise

__all__ = ["fastest", "medians", "timed"]

#: Calls of each candidate after the first, at most, and in how many seconds; short ones are called more.
CALLS, ENOUGH, MANY, BRIEF = 5, 0.5, 25, 0.03

#: A candidate whose first call takes as many seconds is called no more.
LONG = 10.0

#: A smaller share is noise.
MARGIN = 0.05


def fastest(candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate; of several that are about as fast, the first."""
    seconds = medians(candidates)
    limit = min(seconds.values()) * (1 + MARGIN)
    return next(name for name in candidates if seconds[name] <= limit)


def medians(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of some calls of each candidate; the first warms up, and is the only one if it is long.

    They take turns, so that a machine that slows down slows all alike. Medians rather than minima: beside other work
    some candidates suffer more than others.
    """
    firsts = {name: timed(candidate) for name, candidate in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(MANY):
        limit = ENOUGH if turn < CALLS else BRIEF
        for name, candidate in candidates.items():
            if firsts[name] < LONG and sum(seconds[name]) < limit:
                seconds[name].append(timed(candidate))
    return {name: statistics.median(times or [firsts[name]]) for name, times in seconds.items()}


def timed(function: Callable[[], object]) -> float:
    """The seconds of one call."""
    began = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - began
