"""The C library's memory allocator, set to keep the large blocks that every step allocates anew."""

from __future__ import annotations

import ctypes
import functools
import sys

__all__ = ["give_back", "tune"]

MIB = 2**20

#: What `mallopt` is told, by the numbers that glibc's malloc.h gives its parameters: blocks below a size come from the
#: heap rather than from the system (M_MMAP_THRESHOLD; more than 32 MiB is refused), and the heap is given back only
#: above a size (M_TRIM_THRESHOLD) and grown by so much at a time (M_TOP_PAD). In bytes.
SETTINGS = {-3: 32 * MIB, -1: 1024 * MIB, -2: 64 * MIB}


@functools.cache
def tune() -> bool:
    """Once per process; returns whether it could be done: it is glibc, on Linux, that knows these settings.

    Otherwise a large block is a new mapping each time, whose pages the system has to clear before they are used: on
    networks of convolutions a good part of a step.
    """
    libc = glibc()
    if libc is None:
        return False
    taken = [libc.mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()]
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
