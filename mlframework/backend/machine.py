"""The machine that a step runs on: its devices, its allocator, its clock and its memory."""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mlframework.backend.private import TorchDispatchMode, storage_key, tree_leaves

__all__ = ["PeakMemory", "fastest", "fork_rng", "give_back", "medians", "name_of", "synchronise", "timed", "tune"]

MIB = 2**20

#: What `mallopt` is told, by the numbers that glibc's malloc.h gives its parameters: blocks below a size come from the
#: heap rather than from the system (M_MMAP_THRESHOLD; more than 32 MiB is refused), and the heap is given back only
#: above a size (M_TRIM_THRESHOLD) and grown by so much at a time (M_TOP_PAD). In bytes.
MALLOPT = {-3: 32 * MIB, -1: 1024 * MIB, -2: 64 * MIB}

#: Calls of each candidate after the first, at most, and in how many seconds; short ones are called more.
CALLS, ENOUGH, MANY, BRIEF = 5, 0.5, 25, 0.03

#: A candidate whose first call takes as many seconds is called no more.
LONG = 10.0

#: A smaller share is noise.
MARGIN = 0.05


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Keeps the random numbers of the CPU and of a device as they are."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def synchronise() -> None:
    """Waits until the GPU has finished its work, before a clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def name_of(device: torch.device) -> str:
    """The product name of a GPU; the kind of any other device."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type


@functools.cache
def tune() -> bool:
    """Lets glibc keep the large blocks that every step allocates anew, once per process; whether it could be done.

    Otherwise the system clears the pages of each block: on networks of convolutions a good part of a step.
    """
    libc = glibc()
    taken = [libc is not None and libc.mallopt(parameter, value) == 1 for parameter, value in MALLOPT.items()]
    return all(taken)


def give_back() -> None:
    """Returns unused memory to the system, after work that took far more than a step does."""
    libc = glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc, on Linux."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def fastest(candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate; of several that are about as fast, the first."""
    seconds = medians(candidates)
    limit = min(seconds.values()) * (1 + MARGIN)
    return next(name for name in candidates if seconds[name] <= limit)


def medians(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of some calls of each candidate; the first warms up, and is the only one if it is long.

    They take turns, so that a machine that slows down slows all alike.
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


class PeakMemory(TorchDispatchMode):
    """Counts operations, and the bytes of all tensors that are made within it and still held, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        given = {storage_key(storage) for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage_key(storage) not in given | self.known:
                self.follow(storage)
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage_key(storage))
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.forget, storage_key(storage), storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
