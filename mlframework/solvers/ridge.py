"""Ridge regression in closed form, batched over tasks; plain autograd differentiates it to any order."""

from __future__ import annotations

import torch
from torch import Tensor

from mlframework.solvers.linear import solve_each
from mlframework.solvers.support_vectors import Solution, regularised

__all__ = ["kernel_ridge"]

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
    wanted = targets.double()
    if mask is not None:
        wanted = torch.where(mask.unsqueeze(-1) > 0, wanted, 0.0)
    matrix = regularised(kernel, reg, mask)
    dual = solve_each(matrix, wanted)
    with torch.no_grad():
        rest = (matrix @ dual - wanted).abs().amax((-2, -1)) / wanted.abs().amax((-2, -1)).clamp(min=1e-300)
    return Solution(dual.to(kernel.dtype), rest.to(kernel.dtype), rest <= TOLERANCE)
