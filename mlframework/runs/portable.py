"""Operators that ONNX lacks, written in operators that it has, while a model is exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["portable"]

#: Coefficients of a fit to the complementary error function.
ERFC = (
    *(-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806),
    *(0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277),
)


@contextmanager
def portable(function: Callable[[], Any]) -> Iterator[None]:
    """Within this context some operators are others that ONNX knows, with the same results up to rounding.

    Triangular matrices are inverted beforehand, in a call of the function: they must be the same in every call of it,
    as those of a fitted model are. A model for which that is wrong gives other predictions, which the export notices.
    """
    with Inverting() as solved:
        function()
    with Replacing(solved.inverses):
        yield


class Inverting(TorchFunctionMode):
    """Collects the inverse of each triangular matrix with which a system is solved."""

    def __init__(self) -> None:
        super().__init__()
        self.inverses: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.linalg.solve_triangular:
            identity = torch.eye(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
            self.inverses.append(func(args[0], identity.expand_as(args[0]), **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class Replacing(TorchFunctionMode):
    """Multiplies by inverses in place of solving, in the order of the calls."""

    def __init__(self, inverses: Sequence[Tensor]) -> None:
        super().__init__()
        self.inverses = iter(inverses)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.linalg.solve_triangular and (inverse := next(self.inverses, None)) is not None:
            return inverse @ args[1]
        if func is torch.special.log_ndtr:
            return log_ndtr(args[0])
        return func(*args, **(kwargs or {}))


def log_ndtr(x: Tensor) -> Tensor:
    """The logarithm of the standard normal distribution function; the function's relative error is below 1.2e-7.

    Reference: Press et al., Numerical Recipes in C, 1992, section 6.2, the function `erfcc`.
    """
    z = x.abs() / math.sqrt(2)
    t = 1 / (1 + 0.5 * z)
    series = torch.zeros_like(t)
    for coefficient in reversed(ERFC):
        series = coefficient + t * series
    below = t.log() - z.square() + series - math.log(2)  # of minus the size of x
    return torch.where(x < 0, below, (1 - below.exp()).log())
