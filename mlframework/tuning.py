"""Which of several ways is the fastest, measured once on a machine and remembered."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from mlframework.devices import synchronise
from mlframework.files import cache_folder, write_first

__all__ = ["fastest", "known"]

#: Ways that were found to be the fastest, by what was asked.
KNOWN: dict[str, str] = {}

#: A way that takes as many seconds is run no more than once.
LONG = 1.0

#: Less is noise.
MARGIN = 0.05

log = logging.getLogger(__name__)


def fastest(question: str, ways: Mapping[str, Callable[[], object]], *, margin: float = MARGIN) -> str:
    """The name of the fastest way; of those that are about as fast, the first.

    What was measured is kept in the cache folder, so that a run that goes on later takes the same steps. Of processes
    that measure at once, the first to end has answered for all.

    Args:
        question: all that the answer depends on, but for the processor, torch and its number of threads.
        ways: by name; each is called a few times.
        margin: by how much a way must be faster than those that stand before it, as a share.
    """
    answer = known(question)
    if answer is not None and answer in ways:
        return answer
    seconds = {name: shortest(way) for name, way in ways.items()}
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
    return f"{question}, {machine()}, torch {torch.__version__}, threads {torch.get_num_threads()}"


@functools.cache
def machine() -> str:
    return platform.processor() or platform.machine()


def shortest(way: Callable[[], object]) -> float:
    """The shortest of some calls, in seconds; the first warms up, and is the only one if it is long."""
    seconds: list[float] = []
    while len(seconds) < 4 and not (seconds and seconds[0] > LONG):
        began = time.perf_counter()
        way()
        synchronise()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:] or seconds)


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
    file, text = cache_file(asked), json.dumps({"question": asked, "fastest": answer})
    try:
        if file.exists() and remembered(asked) not in ways:  # damaged, or of another version
            file.unlink(missing_ok=True)
        write_first(file, text)
    except OSError as error:
        log.warning("what is fastest is measured anew in every process: %s cannot be written (%s)", file, error)
    kept = remembered(asked)
    return answer if kept is None or kept not in ways else kept
