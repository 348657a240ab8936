"""An interior point method for many small quadratic programs with bounds: slow, and it never goes round in circles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["interior_point"]

MAX_STEPS = 60  # more than enough: 10 to 20 are usual
TOLERANCE = 1e-11  # of residuals and complementarity, at which to stop


class Point(NamedTuple):
    """An iterate, or a step from one to the next."""

    optimum: Tensor  # [tasks, k, n]
    shared: Tensor  # multipliers of the coupling, [tasks, 1, n]
    slack: Tensor  # distances to the upper and the lower bound, 1 if that is infinite, [2, tasks, k, n]
    push: Tensor  # the multipliers of the two, 0 if the bound is infinite, [2, tasks, k, n]


def interior_point(kernel: Tensor, linear: Tensor, lower: Tensor, upper: Tensor, coupled: bool) -> Tensor:
    """Which entries stand at their upper bound (1), their lower bound (-1), or are free (0), `[tasks, k, n]`.

    The arguments are those of `box_qp.Problem`, scaled. Every step factors one matrix per class, and their Schur
    complement over the examples.

    Reference: Mehrotra, On the implementation of a primal-dual interior point method, 1992, doi:10.1137/0802028.
    """
    finite = torch.stack((upper, lower)).isfinite()
    # 1 for an upper bound, -1 for a lower one, 0 for none; every constraint is `side * optimum <= bounds`.
    side = finite * linear.new_tensor([1.0, -1.0]).view(2, 1, 1, 1)
    bounds = torch.where(finite, torch.stack((upper, -lower)), 1.0)
    count = finite.sum((0, 2, 3)).clamp(min=1)
    zero = torch.zeros_like(linear)
    point = Point(zero, zero[:, :1], bounds.clamp(min=1.0), side.abs())
    for _ in range(MAX_STEPS):
        # Residuals of the linear optimality conditions: forces, distances to the bounds, and sums over classes.
        force = linear - point.optimum @ kernel - point.shared - (side * point.push).sum(0)
        sums = point.optimum.sum(1, keepdim=True) if coupled else zero[:, :1]
        rest = force, bounds - side * point.optimum - point.slack, sums
        products = point.push * point.slack
        if max(float(part.abs().max()) for part in (*rest, products)) < TOLERANCE:
            break
        inverted = factors(kernel, point, coupled)
        ahead = newton_step(point, side, rest, inverted, products)
        # The predictor tells how far the products can fall; the corrector aims there, with its second-order term.
        reached = advanced(point, ahead, longest(point, ahead))
        mean, left = (each.sum((0, 2, 3)) / count for each in (products, reached.push * reached.slack))
        target = mean * (left / mean.clamp(min=1e-300)).clamp(0, 1) ** 3
        less = (products + ahead.push * ahead.slack - target[:, None, None]) * finite
        step = newton_step(point, side, rest, inverted, less)
        point = advanced(point, step, 0.995 * longest(point, step))
    up, down = (point.push > point.slack).to(linear.dtype)
    return up - down


def newton_step(
    point: Point, side: Tensor, rest: tuple[Tensor, ...], inverted: tuple[Tensor, Tensor], less: Tensor
) -> Point:
    """The Newton step towards multipliers times distances that are smaller by `less` `[2, tasks, k, n]`."""
    (force, gap, sums), (blocks, coupling) = rest, inverted
    force = force + (side * (less + point.push * gap) / point.slack).sum(0)
    moved = (blocks @ force.unsqueeze(-1)).squeeze(-1)
    shared = (moved.sum(1, keepdim=True) + sums) @ coupling
    moved = moved - (blocks @ shared.unsqueeze(-1)).squeeze(-1)
    slack = gap - side * moved
    return Point(moved, shared, slack, -(less + point.push * slack) / point.slack)


def factors(kernel: Tensor, point: Point, coupled: bool) -> tuple[Tensor, Tensor]:
    """The inverse of each class's matrix `[tasks, k, n, n]`, and of their sum `[tasks, n, n]` (0 if not coupled)."""
    blocks = torch.linalg.inv(kernel.unsqueeze(1) + torch.diag_embed((point.push / point.slack).sum(0)))
    if not coupled:
        return blocks, torch.zeros_like(kernel)
    return blocks, torch.linalg.pinv(blocks.sum(1), hermitian=True)


def longest(point: Point, step: Point) -> Tensor:
    """How far each task can go, at most 1, with distances and multipliers staying above 0: `[tasks, 1, 1]`."""
    values, changes = torch.stack(point[2:]), torch.stack(step[2:])
    limits = torch.where(changes < 0, -values / changes.clamp(max=-1e-300), torch.inf)
    return limits.amin((0, 1, 3, 4)).clamp(max=1.0)[:, None, None]


def advanced(point: Point, step: Point, length: Tensor) -> Point:
    return Point(*(value + length * change for value, change in zip(point, step, strict=True)))
