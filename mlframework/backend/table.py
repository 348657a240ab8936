"""Tables that depend on numbers alone, as of positions: computed once, and read by compiled steps as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["table"]


def table(**numbers: type) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Remembers what a function returns for numbers, and for the type and device of a tensor.

    A compiler reads the table, where it would compute each of its numbers anew for every number that depends on it.

    Args:
        numbers: the function's arguments after the first, with their types, `int` or `float`. The first is a tensor
            without axes, whose type and device the table takes.
    """

    def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.lru_cache(maxsize=64)
        def remembered(dtype: torch.dtype, device: torch.device, *values: Any) -> Tensor:
            return function(torch.zeros((), dtype=dtype, device=device), *values)

        # An operator's result is its caller's own, so it is a copy.
        operator = torch.library.custom_op(
            f"mlframework::{function.__name__}",
            lambda like, *values: remembered(like.dtype, like.device, *values).clone(),
            mutates_args=(),
            schema=f"(Tensor like, {', '.join(f'{kind.__name__} {name}' for name, kind in numbers.items())}) -> Tensor",
        )
        operator.register_fake(function)

        @functools.wraps(function)
        def read(x: Tensor, *values: Any) -> Tensor:
            # `x` may belong to a task of `vmap`, or to a graph; the table does not.
            return operator(torch.zeros((), dtype=x.dtype, device=x.device), *values)

        return read

    return decorated
