"""The result of a solver."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Solution"]


class Solution(NamedTuple):
    """The optimum of every task's problem, and how near it is.

    Attributes:
        dual: coefficients of the support examples, `[tasks, n, k]`; predictions are `kernel(query, support) @ dual`.
        residual: how far the optimality conditions are from holding, `[tasks]`, scale-free and detached.
        converged: whether that is as small as it should be, `[tasks]`.
    """

    dual: Tensor
    residual: Tensor
    converged: Tensor
