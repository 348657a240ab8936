"""The lower door of the backend: what layers, inner loops, algorithms and evaluation may ask of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mlframework.backend import stacked
from mlframework.backend.algorithm import Engine
from mlframework.backend.convolve import WithoutIdleStrides
from mlframework.backend.engine import over_tasks
from mlframework.backend.machine import fork_rng, name_of, synchronise
from mlframework.backend.private import has_bf16, is_fake, swap_tensors
from mlframework.backend.stacked import (
    batch_norm,
    by_vmap,
    differentiable_attention,
    per_task,
    repeated,
    runs_in_turn,
    runs_parts,
    runs_per_task,
    runs_together,
)
from mlframework.episode import Params

__all__ = [
    "Engine",
    "batch_norm",
    "by_vmap",
    "call_per_task",
    "compiled_by",
    "fork_rng",
    "has_bf16",
    "is_fake",
    "name_of",
    "over_tasks",
    "per_task",
    "region",
    "repeated",
    "runs_in_turn",
    "runs_parts",
    "runs_per_task",
    "runs_together",
    "swap_tensors",
    "synchronise",
    "table",
]

#: Modules that were asked for already, and whether a parameter of theirs has two names.
TIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def call_per_task(
    module: nn.Module,
    params: Params,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    engine: Engine = "vectorised",
    multiply_in: torch.dtype | None = None,
) -> Tensor:
    """The output `[tasks, n, ...]` of a module, called with each task's parameters on each task's inputs.

    Args:
        module: is written for the examples of one task, and stays as it is.
        params: stacked parameters `[tasks, *shape]` that stand in for the module's own; all tasks share the others.
        x: `[tasks, n, *x_shape]`.
        mask: `[tasks, n, ...]`, handed to the module beside `x`; None: nothing is.
        engine: see `over_tasks`. Vectorised, layers with a rule of their own take it; see `runs_per_task`.
        multiply_in: the type of products and convolutions, by torch's autocast; the output is in float32 all the same.
            None: that of the parameters.
    """
    if multiply_in is not None:
        with WithoutIdleStrides(), torch.autocast(x.device.type, dtype=multiply_in):
            return call_per_task(module, params, x, mask, engine=engine).float()
    if engine == "vectorised" and not is_tied(module) and stacked.supports(module, x):
        return stacked.forward(module, params, x, mask)

    def one_task(params: Params, *inputs: Tensor) -> Tensor:
        # Copies of the buffers, so that a module which writes to them starts every task alike and stays as it was.
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with swap_tensors(module, {**buffers, **params}):
            return module(*inputs)

    with differentiable_attention():
        return over_tasks(one_task, params, *((x,) if mask is None else (x, mask)), engine=engine)


def is_tied(module: nn.Module) -> bool:
    """Whether a parameter has two names; remembered: a small step has no time to ask."""
    if module not in TIED:
        TIED[module] = len(list(module.parameters())) < len(list(module.named_parameters(remove_duplicate=False)))
    return TIED[module]


def table(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remembers what a function of a tensor without axes and of numbers returns, for its type and device and for them.

    A compiler reads the table, where it would compute each of its numbers anew for every number that depends on it.
    """

    @functools.lru_cache(maxsize=64)
    def remembered(dtype: torch.dtype, device: torch.device, *values: Any) -> Tensor:
        return function(torch.zeros((), dtype=dtype, device=device), *values)

    # An operator's result is its caller's own, so it is a copy.
    operator = torch.library.custom_op(
        f"mlframework::{function.__name__}",
        lambda like, *values: remembered(like.dtype, like.device, *values).clone(),
        mutates_args=(),
        schema=torch.library.infer_schema(function, mutates_args=()),
    )
    operator.register_fake(function)

    @functools.wraps(function)
    def read(x: Tensor, *values: Any) -> Tensor:
        if torch.compiler.is_exporting():  # an exported program knows torch's operators alone
            return function(x.new_zeros(()), *values)
        # `x` may belong to a task of `vmap`, or to a graph; the table does not.
        return operator(torch.zeros((), dtype=x.dtype, device=x.device), *values)

    return read


#: Calls a function with arguments, and with `recompute`; see `region`.
COMPILER: ContextVar[Callable[..., Any] | None] = ContextVar("compiler", default=None)


def region(function: Callable[..., Any], *, recompute: bool = True) -> Callable[..., Any]:
    """A function that a step calls again and again, which a compiler may compile once and reuse.

    Without an active compiler it is the function itself. A compiler knows a function by its qualified name, so its
    value must depend on nothing but its arguments and the parameters and buffers of the meta layer.

    Args:
        function: takes and returns tensors, or nests of them, and numbers.
        recompute: whether the backward pass computes cheap intermediate results anew, which saves memory.
    """
    compiler = COMPILER.get()
    # Bound here, not in the call: a checkpoint calls again from another thread, which has no active compiler.
    return function if compiler is None else lambda *args: compiler(function, *args, recompute=recompute)


@contextmanager
def compiled_by(compiler: Callable[..., Any] | None) -> Iterator[None]:
    """Within this context, `region` hands functions to a compiler; with None they run as they are."""
    token = COMPILER.set(compiler)
    try:
        yield
    finally:
        COMPILER.reset(token)
