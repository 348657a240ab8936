"""The lower door of the backend: what layers, inner loops, algorithms and evaluation may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mlframework.backend import stacked
from mlframework.backend.attention import differentiable_attention
from mlframework.backend.devices import UNDISTURBED, fork_rng, name_of, synchronise
from mlframework.backend.engine import Engine, over_tasks
from mlframework.backend.private import is_fake
from mlframework.backend.stacked import batch_norm, by_vmap, per_task, repeated, runs_in_turn, runs_parts, runs_per_task
from mlframework.backend.swap_tensors import is_tied, swap_tensors
from mlframework.backend.table import table
from mlframework.episode import Params

__all__ = [
    "UNDISTURBED",
    "CompilesRegions",
    "Engine",
    "batch_norm",
    "by_vmap",
    "call_per_task",
    "compiled_by",
    "fork_rng",
    "is_fake",
    "is_tied",
    "name_of",
    "over_tasks",
    "per_task",
    "region",
    "repeated",
    "runs_in_turn",
    "runs_parts",
    "runs_per_task",
    "swap_tensors",
    "synchronise",
    "table",
]

#: Modules that were asked for already, and whether a parameter of theirs has two names.
TIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def call_per_task(
    module: nn.Module, params: Params, x: Tensor, mask: Tensor | None = None, *, engine: Engine = "vectorised"
) -> Tensor:
    """The output `[tasks, n, ...]` of a module, called with each task's parameters on each task's inputs.

    Args:
        module: is written for the examples of one task, and stays as it is.
        params: stacked parameters `[tasks, *shape]` that stand in for the module's own; all tasks share the others.
        x: `[tasks, n, *x_shape]`.
        mask: `[tasks, n, ...]`, handed to the module beside `x`; None: nothing is.
        engine: see `over_tasks`. Vectorised, layers with a rule of their own take it; see `runs_per_task`.
    """
    if engine == "vectorised" and not tied(module) and stacked.supports(module, x):
        return stacked.forward(module, params, x, mask)

    def one_task(params: Params, *inputs: Tensor) -> Tensor:
        # Copies of the buffers, so that a module which writes to them starts every task alike and stays as it was.
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with swap_tensors(module, {**buffers, **params}):
            return module(*inputs)

    with differentiable_attention():
        return over_tasks(one_task, params, *((x,) if mask is None else (x, mask)), engine=engine)


def tied(module: nn.Module) -> bool:
    """`is_tied`, remembered: a small step has no time to ask."""
    if module not in TIED:
        TIED[module] = is_tied(module)
    return TIED[module]


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
