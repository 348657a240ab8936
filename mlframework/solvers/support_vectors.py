"""Dual support vector machines, batched over tasks, exact, and differentiable to any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.solvers.box_qp import TOLERANCE, Problem, solve

__all__ = ["Solution", "crammer_singer", "one_vs_rest"]


class Solution(NamedTuple):
    """The optimum of every task's problem, and how near it is; predictions are `kernel(query, support) @ dual`."""

    dual: (
        Tensor  # coefficients of the support examples, [tasks, n, k]; of `linear_ridge`, of the features, [tasks, p, k]
    )
    residual: Tensor  # how far the optimality conditions are from holding, scale-free and detached, [tasks]
    converged: Tensor  # whether that is as small as it should be, [tasks]


def crammer_singer(
    kernel: Tensor, y: Tensor, *, c: Tensor | float, reg: Tensor | float = 1.0, mask: Tensor | None = None
) -> Solution:
    """The multi-class support vector machine of Crammer and Singer.

        min_A  1/2 <A, (K + reg I) A> - <Y, A>    s.t.  A <= c Y,  each row of A sums to 0

    It is solved in float64, exactly. `reg = 1` is the unregularised machine on the features `[x_i, e_i]`.

    Args:
        kernel: `K` of the support examples, without `reg`: `[tasks, n, n]`.
        y: one-hot classes `[tasks, n, k]`.
        c: how much an example may push, above 0; a scalar, or `[tasks]`.
        reg: added to the kernel's diagonal, above 0; a scalar, or `[tasks]`.
        mask: which examples count, `[tasks, n]`; None: all.

    Returns:
        Its `dual` `[tasks, n, k]` is `A`, 0 for an example that does not count.

    Reference: Crammer, Singer, On the algorithmic implementation of multiclass kernel-based vector machines, 2001;
        Lee et al., Meta-Learning with Differentiable Convex Optimization, 2019, arXiv:1904.03758, equation 6.
    """
    classes = y.double().mT
    upper = per_task(c, y) * classes
    return solution(kernel, reg, mask, (classes, torch.full_like(classes, -torch.inf), upper), coupled=True)


def one_vs_rest(
    kernel: Tensor, y: Tensor, *, c: Tensor | float, reg: Tensor | float = 1.0, mask: Tensor | None = None
) -> Solution:
    """A support vector machine with hinge loss for each class against all others, without a bias.

        min_A  1/2 <A, (K + reg I) A> - <S, A>    s.t.  0 <= S A <= c  elementwise, with S = 2 Y - 1

    Arguments and result are those of `crammer_singer`.

    Reference: Cortes, Vapnik, Support-vector networks, 1995, doi:10.1007/BF00994018, with `c` for the bound.
    """
    signs = 2 * y.double().mT - 1
    bound = per_task(c, y) * signs
    return solution(kernel, reg, mask, (signs, bound.clamp(max=0), bound.clamp(min=0)), coupled=False)


def solution(
    kernel: Tensor, reg: Tensor | float, mask: Tensor | None, leaves: tuple[Tensor, ...], *, coupled: bool
) -> Solution:
    """The solved problem with these other leaves `[tasks, k, n]`, which are 0 for masked examples."""
    if mask is not None:
        leaves = tuple(torch.where(mask.unsqueeze(-2) > 0, leaf, 0.0) for leaf in leaves)
    optimum, residual = solve(Problem._make((regularised(kernel, reg, mask), *leaves, coupled)))
    return Solution(optimum.mT.to(kernel.dtype), residual.to(kernel.dtype), residual <= TOLERANCE)


def per_task(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar, or a number per task, in float64 and with axes to go with `[tasks, k, n]`."""
    value = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    return value[..., None, None] if value.dim() else value


def regularised(kernel: Tensor, reg: Tensor | float, mask: Tensor | None) -> Tensor:
    """`kernel + reg I` in float64, with rows of the identity for masked examples."""
    identity = torch.eye(kernel.shape[-1], dtype=torch.float64, device=kernel.device)
    whole = kernel.double() + per_task(reg, kernel) * identity
    if mask is None:
        return whole
    counts = mask > 0
    return torch.where(counts.unsqueeze(-1) & counts.unsqueeze(-2), whole, identity)
