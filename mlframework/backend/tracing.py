"""Whether a step is being traced for a compiler: some layers are then written in other operations, which fuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["is_traced", "while_traced"]

TRACED = ContextVar("traced", default=False)


def is_traced() -> bool:
    """Whether the tensors at hand stand for others, in a graph to be compiled."""
    return TRACED.get()


@contextmanager
def while_traced() -> Iterator[None]:
    """Within this context `is_traced()` is true."""
    token = TRACED.set(True)
    try:
        yield
    finally:
        TRACED.reset(token)
