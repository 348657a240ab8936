"""Linear systems, one per task, differentiable to any order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["factor_each", "solve_each", "with_mapped_axis"]

#: The largest matrices that torch 2.5 to 2.13 factorise correctly as a batch: with more than one thread on a CPU, the
#: pivots of larger ones are arbitrary, and so are the solutions (github.com/pytorch/pytorch/issues/142815).
LARGEST_OF_A_BATCH = 150


def solve_each(matrix: Tensor, right: Tensor) -> Tensor:
    """`X` `[tasks, n, k]` of `matrix X = right`, for a matrix `[tasks, n, n]` and a right side `[tasks, n, k]`."""
    return OneByOne.apply(matrix, right) if one_by_one(matrix) else torch.linalg.solve(matrix, right)


def factor_each(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors and pivots of `torch.linalg.lu_factor`, for a matrix `[tasks, n, n]`."""
    if not one_by_one(matrix):
        return torch.linalg.lu_factor(matrix)
    factors, pivots = zip(*(torch.linalg.lu_factor(each) for each in matrix), strict=True)
    return torch.stack(factors), torch.stack(pivots)


def one_by_one(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.shape[-1] > LARGEST_OF_A_BATCH


def with_mapped_axis(info: Any, in_dims: tuple[int | None, ...], leaves: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The arguments of a `vmap` rule; the mapped axis joins the axis of tasks."""
    for leaf, axis in zip(leaves, in_dims, strict=True):
        yield (leaf.expand(info.batch_size, *leaf.shape) if axis is None else leaf.movedim(axis, 0)).flatten(0, 1)


class OneByOne(torch.autograd.Function):
    """`solve_each`, task by task, also where `vmap` would make a batch of it."""

    @staticmethod
    def forward(matrix: Tensor, right: Tensor) -> Tensor:
        return torch.stack([torch.linalg.solve(one, its) for one, its in zip(matrix, right, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        matrix, solution = ctx.saved_tensors
        by_right = solve_each(matrix.mT, gradient)
        return -by_right @ solution.mT, by_right

    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor | None, d_right: Tensor | None) -> Tensor:
        matrix, solution = ctx.saved_tensors
        change = torch.zeros_like(solution) if d_right is None else d_right
        return solve_each(matrix, change if d_matrix is None else change - d_matrix @ solution)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return solve_each(*with_mapped_axis(info, in_dims, args)).unflatten(0, (info.batch_size, -1)), 0
