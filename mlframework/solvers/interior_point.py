"""An interior point method for many small quadratic programs with bounds: slow, and not to be led round in circles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["interior_point"]

#: More than enough: 10 to 20 are usual.
MAX_STEPS = 60
#: Residuals and complementarity at which to stop.
TOLERANCE = 1e-11


class Point(NamedTuple):
    """Where the method stands, `[tasks, k, n]` but for the second.

    Attributes:
        optimum: the variables.
        shared: multipliers of the coupling, `[tasks, 1, n]`.
        above, below: distances to the upper and the lower bound.
        up, down: the multipliers of the two.
    """

    optimum: Tensor
    shared: Tensor
    above: Tensor
    below: Tensor
    up: Tensor
    down: Tensor


def interior_point(kernel: Tensor, linear: Tensor, lower: Tensor, upper: Tensor, coupled: bool) -> Tensor:
    """Which entries stand at their upper bound (1), their lower bound (-1), or are free (0), `[tasks, k, n]`.

    The arguments are those of `box_qp.Problem`, scaled. Every step factors one matrix per class, and their Schur
    complement over the examples.

    Reference: Mehrotra, On the implementation of a primal-dual interior point method, 1992, doi:10.1137/0802028.
    """
    bounded_above, bounded_below = upper.isfinite(), lower.isfinite()
    # An infinite bound has no multiplier; its distance is any positive number.
    top, bottom = torch.where(bounded_above, upper, 0.0), torch.where(bounded_below, lower, 0.0)
    zero, one = torch.zeros_like(linear), torch.ones_like(linear)
    above, below = top.clamp(min=1.0), (-bottom).clamp(min=1.0)
    point = Point(zero, zero[:, :1], above, below, one * bounded_above, one * bounded_below)
    for _ in range(MAX_STEPS):
        force = linear - point.optimum @ kernel - point.shared - point.up + point.down
        gap_above = torch.where(bounded_above, top - point.optimum - point.above, 0.0)
        gap_below = torch.where(bounded_below, point.optimum - bottom - point.below, 0.0)
        sums = point.optimum.sum(1, keepdim=True) if coupled else zero[:, :1]
        products = (point.up * point.above, point.down * point.below)
        worst = max(float(part.abs().max()) for part in (force, gap_above, gap_below, sums, *products))
        if worst < TOLERANCE:
            break
        blocks, coupling = factors(kernel, point, coupled)

        def direction(
            rest_up: Tensor,
            rest_down: Tensor,
            *,
            point: Point = point,
            force: Tensor = force,
            gaps: tuple[Tensor, Tensor] = (gap_above, gap_below),
            sums: Tensor = sums,
            inverted: tuple[Tensor, Tensor] = (blocks, coupling),
        ) -> Point:
            """The Newton step towards multipliers times distances that are smaller by `rest_up` and `rest_down`."""
            right = (
                force + (rest_up + point.up * gaps[0]) / point.above - (rest_down + point.down * gaps[1]) / point.below
            )
            moved = (inverted[0] @ right.unsqueeze(-1)).squeeze(-1)
            shared = (moved.sum(1, keepdim=True) + sums) @ inverted[1]
            moved = moved - (inverted[0] @ shared.unsqueeze(-1)).squeeze(-1)
            d_above, d_below = gaps[0] - moved, gaps[1] + moved
            d_up = -(rest_up + point.up * d_above) / point.above
            d_down = -(rest_down + point.down * d_below) / point.below
            return Point(moved, shared, d_above * bounded_above, d_below * bounded_below, d_up, d_down)

        bounds = (bounded_above.sum((1, 2)) + bounded_below.sum((1, 2))).clamp(min=1)[:, None, None]
        mean = (products[0] + products[1]).sum((1, 2), keepdim=True) / bounds
        ahead = direction(*products)
        reached = advanced(point, ahead, longest(point, ahead))
        left = (reached.up * reached.above + reached.down * reached.below).sum((1, 2), keepdim=True) / bounds
        target = mean * (left / mean.clamp(min=1e-300)).clamp(0, 1) ** 3
        step = direction(
            (products[0] + ahead.up * ahead.above - target) * bounded_above,
            (products[1] + ahead.down * ahead.below - target) * bounded_below,
        )
        point = advanced(point, step, 0.995 * longest(point, step))
    return (point.up > point.above).to(linear.dtype) - (point.down > point.below).to(linear.dtype)


def factors(kernel: Tensor, point: Point, coupled: bool) -> tuple[Tensor, Tensor]:
    """The inverse of each class's matrix `[tasks, k, n, n]`, and of their sum `[tasks, n, n]` (0 if not coupled)."""
    weights = point.up / point.above + point.down / point.below
    blocks = torch.linalg.inv(kernel.unsqueeze(1) + torch.diag_embed(weights))
    if not coupled:
        return blocks, torch.zeros_like(kernel)
    return blocks, torch.linalg.pinv(blocks.sum(1), hermitian=True)


def longest(point: Point, step: Point) -> Tensor:
    """How far each task can go, at most 1, with distances and multipliers staying above 0: `[tasks, 1, 1]`."""
    limits = [
        torch.where(change < 0, -value / change.clamp(max=-1e-300), torch.inf).amin((1, 2), keepdim=True)
        for value, change in zip(point[2:], step[2:], strict=True)
    ]
    return torch.stack(limits).amin(0).clamp(max=1.0)


def advanced(point: Point, step: Point, length: Tensor) -> Point:
    return Point(*(value + length * change for value, change in zip(point, step, strict=True)))
