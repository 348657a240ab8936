"""Which of several ways is the fastest, measured once on a machine and remembered."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mlframework.files import atomic, cache_folder

__all__ = ["fastest", "is_known"]

#: Ways that were found to be the fastest, by what was asked.
KNOWN: dict[str, str] = {}

#: A way that takes as many seconds is run no more than once.
LONG = 1.0

#: By how much a way must be faster than those that stand before it, as a share: less is noise.
MARGIN = 0.05

log = logging.getLogger(__name__)


def fastest(question: str, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest way; of those that are about as fast, the first.

    What was measured is kept in the cache folder, so that a run that goes on later takes the same steps.

    Args:
        question: all that the answer depends on, but for the machine, torch and its number of threads.
        ways: by name; each is called a few times.
    """
    asked = with_threads(question)
    if not is_known(question) or KNOWN[asked] not in ways:
        seconds = {name: shortest(way) for name, way in ways.items()}
        limit = min(seconds.values()) * (1 + MARGIN)
        KNOWN[asked] = next(name for name in ways if seconds[name] <= limit)
        remember()
    return KNOWN[asked]


def is_known(question: str) -> bool:
    """Whether an answer is at hand, from this process or an earlier one."""
    if with_threads(question) not in KNOWN:
        KNOWN.update(remembered())
    return with_threads(question) in KNOWN


def with_threads(question: str) -> str:
    return f"{question}, threads {torch.get_num_threads()}"


def shortest(way: Callable[[], object]) -> float:
    """The shortest of some calls, in seconds; the first warms up, and is the only one if it is long."""
    seconds: list[float] = []
    while len(seconds) < 4 and not (seconds and seconds[0] > LONG):
        began = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:] or seconds)


def cache_file() -> Path:
    """Where answers are kept, on this kind of machine with this version of torch."""
    return cache_folder() / f"fastest-{platform.processor() or platform.machine()}-{torch.__version__}.json"


def remembered() -> dict[str, str]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # not there, or damaged by something outside: measured anew
        return {}
    return found if isinstance(found, dict) else {}


def remember() -> None:
    """Adds what was measured to the cache; one that cannot be written is done without."""
    try:
        with atomic(cache_file()) as part:
            part.write_text(json.dumps({**remembered(), **KNOWN}, indent=0))
    except OSError as error:
        log.warning("what is fastest is measured anew in every process: %s cannot be written (%s)", cache_file(), error)
