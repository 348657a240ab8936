"""Which of several ways is the fastest, measured once on a machine and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from mlframework.backend.devices import synchronise
from mlframework.files import as_json, cache_folder, write_first

__all__ = ["fastest", "known", "timed"]

#: Ways that were found to be the fastest, by what was asked.
KNOWN: dict[str, str] = {}

#: Calls of each way after the first, at most, and in how many seconds; short ones are called more, in as many seconds.
CALLS, ENOUGH, MANY, BRIEF = 5, 0.5, 25, 0.03

#: A way whose first call takes as many seconds is called no more; what it calls may have been measured in it as well.
LONG = 10.0

#: Less is noise.
MARGIN = 0.05

log = logging.getLogger(__name__)


def fastest(question: str, ways: Mapping[str, Callable[[], object]], *, margin: float = MARGIN) -> str:
    """The name of the fastest way; of those that are about as fast, the first.

    What was measured is kept in the cache folder, so that a run that goes on later takes the same steps. Of processes
    that measure at once, the first to end has answered for all.

    Args:
        question: all that the answer depends on, but for the processor, torch and its number of threads.
        ways: by name; each is called a few times, see `medians`.
        margin: by how much a way must be faster than those that stand before it, as a share.
    """
    answer = known(question)
    if answer is not None and answer in ways:
        return answer
    seconds = medians(ways)
    limit = min(seconds.values()) * (1 + margin)
    asked = in_full(question)
    KNOWN[asked] = settled(asked, next(name for name in ways if seconds[name] <= limit), ways)
    return KNOWN[asked]


def known(question: str) -> str | None:
    """The answer that is at hand, from this process or an earlier one."""
    asked = in_full(question)
    if asked not in KNOWN and (answer := remembered(asked)) is not None:
        KNOWN[asked] = answer
    return KNOWN.get(asked)


def in_full(question: str) -> str:
    """A question with the machine, torch and its threads."""
    machine = platform.processor() or platform.machine()
    return f"{question}, {machine}, torch {torch.__version__}, threads {torch.get_num_threads()}"


def medians(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of some calls of each way; the first warms up, and is the only one if it is long.

    They take turns: a machine that slows down slows all alike. Beside other work some ways suffer more than others, of
    which their shortest calls tell nothing.
    """
    firsts = {name: timed(way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(MANY):
        limit = ENOUGH if turn < CALLS else BRIEF
        for name, way in ways.items():
            if firsts[name] < LONG and sum(seconds[name]) < limit:
                seconds[name].append(timed(way))
    return {name: statistics.median(times or [firsts[name]]) for name, times in seconds.items()}


def timed(way: Callable[[], object]) -> float:
    """The seconds of one call."""
    began = time.perf_counter()
    way()
    synchronise()
    return time.perf_counter() - began


def cache_file(asked: str) -> Path:
    """Where the answer to a question is kept."""
    return cache_folder() / "fastest" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"


def remembered(asked: str) -> str | None:
    """The answer that is kept, if there is one."""
    try:
        found = json.loads(cache_file(asked).read_text())
        return found["fastest"] if isinstance(found["fastest"], str) else None
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged by something outside: measured anew
        return None


def settled(asked: str, answer: str, ways: Collection[str]) -> str:
    """Keeps an answer, or gives the one that another process has kept meanwhile.

    A cache that cannot be written is done without.
    """
    file, text = cache_file(asked), as_json({"question": asked, "fastest": answer})
    try:
        if file.exists() and remembered(asked) not in ways:  # damaged, or of another version
            file.unlink(missing_ok=True)
        write_first(file, text)
    except OSError as error:
        log.warning("what is fastest is measured anew in every process: %s cannot be written (%s)", file, error)
    kept = remembered(asked)
    return answer if kept is None or kept not in ways else kept
