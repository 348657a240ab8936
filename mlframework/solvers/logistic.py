"""Multinomial logistic regression by Newton's method, batched over tasks, and differentiable to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlframework.solvers.linear import solve_each, with_mapped_axis
from mlframework.solvers.support_vectors import Solution, per_task

__all__ = ["logistic"]

MAX_STEPS = 100  # 5 to 10 are usual
#: A gradient at which to stop, and one up to which a solution counts as converged; probabilities are its scale.
STOP, TOLERANCE = 1e-13, 1e-9


def logistic(kernel: Tensor, y: Tensor, *, reg: Tensor | float, mask: Tensor | None = None) -> Solution:
    """Kernel logistic regression with classes `y`.

        min_A  sum_i cross_entropy((K A)_i, y_i) + reg/2 <A, K A>,    that is    reg A = Y - softmax(K A)

    It is solved in float64 to the end, and differentiated through that equation.

    Args:
        kernel: of the support examples, positive semidefinite, `[tasks, n, n]`.
        y: one-hot `[tasks, n, k]`.
        reg: above 0; a scalar, or `[tasks]`. scikit-learn's `C` is `1 / reg`.
        mask: which examples count, `[tasks, n]`; None: all.

    Returns:
        Its `dual` `[tasks, n, k]` is `A`, 0 for an example that does not count.

    Reference: Zhu, Hastie, Kernel logistic regression and the import vector machine, 2005, section 2.
    """
    counts = y.new_ones(y.shape[:-1]) if mask is None else mask
    weight = (counts > 0).double().unsqueeze(-1)
    problem = kernel.double(), y.double() * weight, per_task(reg, y).expand(len(y), 1, 1), weight
    dual = Optimum.apply(*problem)
    with torch.no_grad():
        left = equation(dual, *problem).abs().amax((-2, -1))
    return Solution(dual.to(kernel.dtype), left.to(kernel.dtype), left <= TOLERANCE)


def equation(dual: Tensor, kernel: Tensor, y: Tensor, reg: Tensor, weight: Tensor) -> Tensor:
    """`reg A + softmax(K A) - Y`, `[tasks, n, k]`: 0 at the optimum."""
    return reg * dual + weight * (kernel @ dual).softmax(-1) - y


def curvature(kernel: Tensor, dual: Tensor, weight: Tensor) -> Tensor:
    """The derivative of `softmax(K A)` by `K A`, a `[k, k]` for each example: `[tasks, n, k, k]`."""
    p = (kernel @ dual).softmax(-1) * weight
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def jacobian(kernel: Tensor, dual: Tensor, reg: Tensor, weight: Tensor) -> Tensor:
    """The derivative of the equation by `A`, `[tasks, n k, n k]`."""
    tasks, n, k = dual.shape
    mixed = torch.einsum("tikm,tij->tikjm", curvature(kernel, dual, weight), kernel).reshape(tasks, n * k, n * k)
    return mixed + reg * torch.eye(n * k, dtype=kernel.dtype, device=kernel.device)


def column(of_examples: Tensor) -> Tensor:
    """`[tasks, n, k]` as the right side of a system, `[tasks, n k, 1]`."""
    return of_examples.flatten(1).unsqueeze(-1)


def newton(kernel: Tensor, y: Tensor, reg: Tensor, weight: Tensor) -> Tensor:
    """The optimum by Newton steps, halved while they do not lessen the objective."""
    dual = torch.zeros_like(y)
    for _ in range(MAX_STEPS):
        gap = equation(dual, kernel, y, reg, weight)
        if float(gap.abs().max()) <= STOP:
            break
        step = solve_each(jacobian(kernel, dual, reg, weight), column(gap)).view_as(gap)
        here = objective(dual, kernel, y, reg, weight)
        length = torch.ones_like(reg)
        for _ in range(30):
            worse = objective(dual - length * step, kernel, y, reg, weight) > here + 1e-12 * (1 + here.abs())
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        moved = dual - length * step
        if not bool((moved - dual).abs().max() > 1e-16 * (1 + dual.abs().max())):
            break
        dual = moved
    return dual


def objective(dual: Tensor, kernel: Tensor, y: Tensor, reg: Tensor, weight: Tensor) -> Tensor:
    scores = kernel @ dual
    losses = weight.squeeze(-1) * scores.logsumexp(-1) - (y * scores).sum(-1)
    return losses.sum(-1)[:, None, None] + reg / 2 * (dual * scores).sum((-2, -1), keepdim=True)  # [tasks, 1, 1]


class Optimum(torch.autograd.Function):
    """The root `A` of the equation, as a function of kernel, classes and regulariser.

    With `L = J^-T dA`: the gradient by `Y` is `L`, by `reg` is `-<L, A>`, by `K` is `-(H L) A^T`, where `H` is the
    softmax's derivative. All of it is made of differentiable operations.
    """

    @staticmethod
    def forward(kernel: Tensor, y: Tensor, reg: Tensor, weight: Tensor) -> Tensor:
        return newton(kernel, y, reg, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        kernel, _, reg, weight = inputs
        ctx.save_for_backward(kernel, reg, weight, output)
        ctx.save_for_forward(kernel, reg, weight, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernel, reg, weight, dual = ctx.saved_tensors
        transposed = jacobian(kernel, dual, reg, weight).mT
        level = solve_each(transposed, column(gradient)).view_as(gradient)
        bent = torch.einsum("tikm,tim->tik", curvature(kernel, dual, weight), level)
        outer = bent @ dual.mT
        return -(outer + outer.mT) / 2, level, -(level * dual).sum((-2, -1), keepdim=True), None

    @staticmethod
    def jvp(ctx: Any, d_kernel: Any, d_y: Any, d_reg: Any, _: Any) -> Tensor:
        kernel, reg, weight, dual = ctx.saved_tensors
        change = torch.zeros_like(dual) if d_y is None else d_y
        if d_kernel is not None:
            scores = (d_kernel + d_kernel.mT) / 2 @ dual
            change = change - torch.einsum("tikm,tim->tik", curvature(kernel, dual, weight), scores)
        if d_reg is not None:
            change = change - d_reg * dual
        return solve_each(jacobian(kernel, dual, reg, weight), column(change)).view_as(dual)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return Optimum.apply(*with_mapped_axis(info, in_dims, args)).unflatten(0, (info.batch_size, -1)), 0
