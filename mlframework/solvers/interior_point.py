"""An interior point method for many small quadratic programs with bounds: slow, and it never goes round in circles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["interior_point"]

#: More than enough: 10 to 20 are usual.
MAX_STEPS = 60
#: Residuals and complementarity at which to stop.
TOLERANCE = 1e-11


class Bounds(NamedTuple):
    """The finite bounds, and 0 in the place of infinite ones; all `[tasks, k, n]` but for the last.

    An infinite bound has no multiplier; its distance is any positive number.

    Attributes:
        top, bottom: the bounds.
        above, below: whether there is one.
        finite: how many bounds of each task are finite, `[tasks, 1, 1]`.
    """

    top: Tensor
    bottom: Tensor
    above: Tensor
    below: Tensor
    finite: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor) -> Bounds:
        above, below = upper.isfinite(), lower.isfinite()
        finite = (above.sum((1, 2)) + below.sum((1, 2))).clamp(min=1)[:, None, None]
        return cls(torch.where(above, upper, 0.0), torch.where(below, lower, 0.0), above, below, finite)

    def mean_product(self, point: Point) -> Tensor:
        """The mean of multipliers times distances, `[tasks, 1, 1]`."""
        return (point.up * point.above + point.down * point.below).sum((1, 2), keepdim=True) / self.finite


class Point(NamedTuple):
    """An iterate, or a step from one to the next; all `[tasks, k, n]` but for the second.

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


class Residuals(NamedTuple):
    """Residuals of the linear optimality conditions: forces, both distances, and sums over classes."""

    force: Tensor
    above: Tensor
    below: Tensor
    sums: Tensor


def interior_point(kernel: Tensor, linear: Tensor, lower: Tensor, upper: Tensor, coupled: bool) -> Tensor:
    """Which entries stand at their upper bound (1), their lower bound (-1), or are free (0), `[tasks, k, n]`.

    The arguments are those of `box_qp.Problem`, scaled. Every step factors one matrix per class, and their Schur
    complement over the examples.

    Reference: Mehrotra, On the implementation of a primal-dual interior point method, 1992, doi:10.1137/0802028.
    """
    bounds = Bounds.of(lower, upper)
    zero, one = torch.zeros_like(linear), torch.ones_like(linear)
    above, below = bounds.top.clamp(min=1.0), (-bounds.bottom).clamp(min=1.0)
    point = Point(zero, zero[:, :1], above, below, one * bounds.above, one * bounds.below)
    for _ in range(MAX_STEPS):
        rest = Residuals(
            linear - point.optimum @ kernel - point.shared - point.up + point.down,
            torch.where(bounds.above, bounds.top - point.optimum - point.above, 0.0),
            torch.where(bounds.below, point.optimum - bounds.bottom - point.below, 0.0),
            point.optimum.sum(1, keepdim=True) if coupled else zero[:, :1],
        )
        products = point.up * point.above, point.down * point.below
        if max(float(part.abs().max()) for part in (*rest, *products)) < TOLERANCE:
            break
        inverted = factors(kernel, point, coupled)
        ahead = newton_step(point, bounds, rest, inverted, *products)
        # The predictor tells how far the products can fall; the corrector aims there, with its second-order term.
        mean = bounds.mean_product(point)
        left = bounds.mean_product(advanced(point, ahead, longest(point, ahead)))
        target = mean * (left / mean.clamp(min=1e-300)).clamp(0, 1) ** 3
        up = (products[0] + ahead.up * ahead.above - target) * bounds.above
        down = (products[1] + ahead.down * ahead.below - target) * bounds.below
        step = newton_step(point, bounds, rest, inverted, up, down)
        point = advanced(point, step, 0.995 * longest(point, step))
    return (point.up > point.above).to(linear.dtype) - (point.down > point.below).to(linear.dtype)


def newton_step(
    point: Point, bounds: Bounds, rest: Residuals, inverted: tuple[Tensor, Tensor], less_up: Tensor, less_down: Tensor
) -> Point:
    """The Newton step towards multipliers times distances that are smaller by `less_up` and `less_down`."""
    blocks, coupling = inverted
    up, down = less_up + point.up * rest.above, less_down + point.down * rest.below
    moved = (blocks @ (rest.force + up / point.above - down / point.below).unsqueeze(-1)).squeeze(-1)
    shared = (moved.sum(1, keepdim=True) + rest.sums) @ coupling
    moved = moved - (blocks @ shared.unsqueeze(-1)).squeeze(-1)
    d_above, d_below = rest.above - moved, rest.below + moved
    d_up, d_down = -(less_up + point.up * d_above) / point.above, -(less_down + point.down * d_below) / point.below
    return Point(moved, shared, d_above * bounds.above, d_below * bounds.below, d_up, d_down)


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
