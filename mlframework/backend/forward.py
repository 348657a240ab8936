"""The lower door of the backend: what layers, inner loops and algorithms may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

__all__ = ["CompilesRegions", "compiled_by", "region"]


class CompilesRegions(Protocol):
    """A compiler of regions."""

    def __call__(self, function: Callable[..., Any], *args: Any, recompute: bool) -> Any:
        """The value of the function; see `region`."""


#: The compiler within `compiled_by`.
COMPILER: ContextVar[CompilesRegions | None] = ContextVar("compiler", default=None)


def region(function: Callable[..., Any], *, recompute: bool = True) -> Callable[..., Any]:
    """A function that a step calls again and again, which a compiler may compile once and reuse.

    Without an active compiler it is the function itself. A compiler knows a function by its qualified name, so its
    value must depend on nothing but its arguments and the parameters and buffers of the meta layer.

    Args:
        function: takes and returns tensors, or nests of them, and numbers.
        recompute: whether the backward pass computes cheap intermediate results anew, which saves memory in a function
            that is called often.
    """
    compiler = COMPILER.get()
    # Bound here, not in the call: a checkpoint calls again from another thread, which has no active compiler.
    return function if compiler is None else lambda *args: compiler(function, *args, recompute=recompute)


@contextmanager
def compiled_by(compiler: CompilesRegions | None) -> Iterator[None]:
    """Within this context, `region` hands functions to a compiler; with None they run as they are."""
    token = COMPILER.set(compiler)
    try:
        yield
    finally:
        COMPILER.reset(token)
