"""Ridge regression in closed form, batched over tasks; plain autograd differentiates it to any order.

`kernel_ridge` solves a system with a row for each example, `linear_ridge` one with a row for each feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlframework.solvers.linear import solve_each
from mlframework.solvers.support_vectors import Solution, regularised

__all__ = ["kernel_ridge", "linear_ridge"]

TOLERANCE = 1e-9  # a relative residual up to which a solution counts as converged


def kernel_ridge(kernel: Tensor, targets: Tensor, *, reg: Tensor | float, mask: Tensor | None = None) -> Solution:
    """The coefficients of support examples that solve `(K + reg I) A = Y`, in float64.

    Args:
        kernel: of the support examples, `[tasks, n, n]`.
        targets: `[tasks, n, k]`.
        reg: above 0; a scalar, or `[tasks]`.
        mask: which examples count, `[tasks, n]`; None: all.

    Returns:
        Its `dual` `[tasks, n, k]` is 0 for an example that does not count; its residual is relative to the targets.
    """
    wanted = counted(targets, mask)
    matrix = regularised(kernel, reg, mask)
    dual = solve_each(matrix, wanted)
    with torch.no_grad():
        rest = matrix @ dual - wanted
    return checked(dual, rest, wanted, kernel.dtype)


def linear_ridge(features: Tensor, targets: Tensor, *, reg: Tensor | float, mask: Tensor | None = None) -> Solution:
    """The weights of features `F` `[tasks, n, p]` that solve `(F^T F + reg I) W = F^T Y`, in float64.

    They predict what `kernel_ridge` does with the kernel `F F^T`, in less memory and time where a task has more
    examples than features. The coefficients `A = (Y - F W) / reg` of these examples are then large and nearly cancel
    in a prediction, so they do not bear rounding to float32. For the arguments see `kernel_ridge`.

    Returns:
        Its `dual` is `W`, `[tasks, p, k]`; its residual is relative to `F^T Y`.
    """
    known = counted(features, mask)
    wanted = known.mT @ counted(targets, mask)
    matrix = regularised(known.mT @ known, reg, None)
    weights = solve_each(matrix, wanted)
    with torch.no_grad():
        rest = matrix @ weights - wanted
    return checked(weights, rest, wanted, features.dtype)


def counted(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `[tasks, n, k]` in float64, 0 where an example does not count."""
    return rows.double() if mask is None else torch.where(mask.unsqueeze(-1) > 0, rows.double(), 0.0)


def checked(dual: Tensor, rest: Tensor, wanted: Tensor, dtype: torch.dtype) -> Solution:
    """The solution with its residual: the largest error of the equations, relative to the largest right-hand side."""
    residual = rest.abs().amax((-2, -1)) / wanted.detach().abs().amax((-2, -1)).clamp(min=1e-300)
    return Solution(dual.to(dtype), residual.to(dtype), residual <= TOLERANCE)
