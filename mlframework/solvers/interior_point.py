"""An interior point method for many small quadratic programs with bounds: slow, and it never goes round in circles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.solvers.free_inverse import times

__all__ = ["interior_point"]

MAX_STEPS = 60  # more than enough: 20 to 30 are usual
CENTERING = 0.1  # the part of the mean complementarity that a step aims at
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

    Reference: Nocedal, Wright, Numerical Optimization, 2006, section 16.6, with one rate of centering for all steps.
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
        target = CENTERING * products.sum((0, 2, 3)) / count
        step = newton_step(kernel, point, side, rest, (products - target[:, None, None]) * finite, coupled)
        length = 0.995 * longest(point, step)
        point = Point(*(value + length * change for value, change in zip(point, step, strict=True)))
    up, down = (point.push > point.slack).to(linear.dtype)
    return up - down


def newton_step(
    kernel: Tensor, point: Point, side: Tensor, rest: tuple[Tensor, ...], less: Tensor, coupled: bool
) -> Point:
    """The Newton step towards multipliers times distances that are smaller by `less` `[2, tasks, k, n]`."""
    force, gap, sums = rest
    blocks = torch.linalg.inv(kernel.unsqueeze(1) + torch.diag_embed((point.push / point.slack).sum(0)))
    coupling = torch.linalg.pinv(blocks.sum(1), hermitian=True) if coupled else torch.zeros_like(kernel)
    moved = times(blocks, force + (side * (less + point.push * gap) / point.slack).sum(0))
    shared = (moved.sum(1, keepdim=True) + sums) @ coupling
    moved = moved - times(blocks, shared)
    slack = gap - side * moved
    return Point(moved, shared, slack, -(less + point.push * slack) / point.slack)


def longest(point: Point, step: Point) -> Tensor:
    """How far each task can go, at most 1, with distances and multipliers staying above 0: `[tasks, 1, 1]`."""
    values, changes = torch.stack(point[2:]), torch.stack(step[2:])
    limits = torch.where(changes < 0, -values / changes.clamp(max=-1e-300), torch.inf)
    return limits.amin((0, 1, 3, 4)).clamp(max=1.0)[:, None, None]
