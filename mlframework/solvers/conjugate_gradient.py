"""Conjugate gradients for many linear systems at once, given only products with their matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Params
from mlframework.errors import InvalidValue

__all__ = ["CGSolution", "conjugate_gradient", "inner_product"]


class CGSolution(NamedTuple):
    x: Params  # the solutions, named and shaped as the right-hand sides
    residual: Tensor  # |b - A x| / |b| by the method's own recurrence, [tasks]; 1 where x is b itself


def conjugate_gradient(multiply: Callable[[Params], Params], b: Params, steps: int) -> CGSolution:
    """Solves `A x = b` for each task, with A symmetric and positive definite.

    Tasks do not see each other. One whose A turns out not to be positive definite keeps what it had before that
    direction, or `b` itself if it is the first. One whose residual is within rounding of `b` is solved and stays as it
    is: further steps would divide one rounding error by another.

    Args:
        multiply: the product of each task's A with vectors like `b`.
        b: right-hand sides, `[tasks, *shape]` each.
        steps: at most; in exact arithmetic, the number of distinct eigenvalues of A is enough.

    Reference: Hestenes, Stiefel 1952; for directions without curvature: Nocedal, Wright, Numerical Optimization, 2006,
        algorithm 7.1.
    """
    if steps < 1:
        raise InvalidValue("steps", steps, "must be at least 1")
    size = largest(b)
    zero: Params = {name: torch.zeros_like(value) for name, value in b.items()}
    # Entries of at most 1: their squares neither overflow nor vanish.
    residual = direction = unit = add(zero, 1 / size, b)
    x = zero
    square = first = inner_product(unit, unit)
    solved = first * torch.finfo(first.dtype).eps ** 2
    going = first != 0  # not a number is not solved
    for step in range(steps):
        product = multiply(direction)
        curvature = inner_product(direction, product)
        if step == 0:
            x = add(x, (going & ~(curvature > 0)).to(square.dtype), unit)
        going = going & (curvature > 0) & (square > solved)
        # A task that has stopped goes on in place: no branch on values, which would wait for the device.
        length = torch.where(going, square / curvature, 0.0)
        x, residual = add(x, length, direction), add(residual, -length, product)
        last, square = square, inner_product(residual, residual)
        direction = add(residual, torch.where(going, square / last, 0.0), direction)
    return CGSolution(add(zero, size, x), torch.where(first != 0, (square / first).sqrt(), 0.0))


def largest(vectors: Params) -> Tensor:
    """The largest magnitude in each task's vectors, over all names: `[tasks]`; 1 where all are 0."""
    found = torch.stack([value.flatten(1).abs().amax(1) for value in vectors.values()]).amax(0)
    return torch.where(found > 0, found, 1.0)


def inner_product(a: Params, b: Params) -> Tensor:
    """The inner product of each task's vectors, over all names: `[tasks]`."""
    return torch.stack([(value * b[name]).flatten(1).sum(1) for name, value in a.items()]).sum(0)


def add(a: Params, factor: Tensor, b: Params) -> Params:
    """`a + factor * b`, with one factor per task `[tasks]`."""
    return {name: value + factor.view(-1, *(1 for _ in value.shape[1:])) * b[name] for name, value in a.items()}
