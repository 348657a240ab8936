"""Columns and targets of tables, brought into the form in which a network reads them; real tables too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["as_classes", "padded", "scaled", "seen_classes", "with_categories"]

#: A standardised number is no further from the mean of the support set than this.
FARTHEST = 5.0


def scaled(values: Tensor, seen: Tensor) -> Tensor:
    """Values `[tables, rows, columns]`, standardised by the rows that are seen `[tables, rows]`, and bounded.

    A column that is constant among these rows becomes 0.
    """
    counts = seen.unsqueeze(-1).to(values.dtype)
    number = counts.sum(1, keepdim=True).clamp(min=1)
    values = values - (values * counts).sum(1, keepdim=True) / number
    deviation = ((values.square() * counts).sum(1, keepdim=True) / number).sqrt()
    varies = deviation > 1e-9
    return torch.where(varies, values / torch.where(varies, deviation, 1.0), 0.0).clamp(-FARTHEST, FARTHEST)


def padded(x: Tensor, width: int, *, rescale: bool) -> Tensor:
    """Columns `[..., columns]` with zeros up to a width; rescaled, rows of any number of columns are as long.

    Reference: Hollmann et al. 2023, arXiv:2207.01848, section 5.1; they multiply by `width / columns`, its square root
        is taken here.
    """
    columns = x.shape[-1]
    x = F.pad(x, (0, width - columns))
    return x * (width / columns) ** 0.5 if rescale else x


def with_categories(x: Tensor, share: float, levels: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Tables `[tables, rows, columns]` of which a share of the columns is made categorical.

    Such a column is cut into levels at random quantiles; half of these columns then get their levels permuted.
    """
    tables, _, columns = x.shape
    low, high = int(levels[0]), int(levels[1])
    chosen = torch.rand(tables, 1, columns, generator=generator) < share
    count = torch.randint(low, high + 1, (tables, 1, columns), generator=generator)
    cuts = torch.rand(tables, high - 1, columns, generator=generator, dtype=x.dtype)
    cuts = torch.where(torch.arange(high - 1)[:, None] < count - 1, cuts, 2.0)  # beyond 1 there is no row
    level = (ranks(x).unsqueeze(2) > cuts.unsqueeze(1)).sum(2)
    order = torch.rand(tables, high, columns, generator=generator).argsort(1)
    permuted = order.gather(1, level)
    nominal = torch.rand(tables, 1, columns, generator=generator) < 0.5
    return torch.where(chosen, torch.where(nominal, permuted, level).to(x.dtype), x)


def ranks(values: Tensor) -> Tensor:
    """The share of rows below each value `[tables, rows, ...]`, from 0 to below 1."""
    order = values.argsort(1).argsort(1)
    return order.to(values.dtype) / values.shape[1]


def as_classes(y: Tensor, classes: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Class numbers `[tables, rows]` from targets `[tables, rows, most classes]`.

    Each table has a number of classes of its own. For half of the tables a class is an interval of the first target,
    for the others the place of the largest target. Classes are of unequal size, and numbered at random.
    """
    tables, _, most = y.shape
    count = torch.randint(int(classes[0]), int(classes[1]) + 1, (tables, 1), generator=generator)
    exists = torch.arange(most) < count  # [tables, most]
    share = torch.where(exists, 0.3 + torch.rand(tables, most, generator=generator, dtype=y.dtype), 0.0)
    borders = (share / share.sum(1, keepdim=True)).cumsum(1)[:, :-1]
    interval = (ranks(y[..., 0]).unsqueeze(-1) >= borders.unsqueeze(1) - 1e-9).sum(-1)
    bias = 0.5 * torch.randn(tables, 1, most, generator=generator, dtype=y.dtype)
    spread = y.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    largest = torch.where(exists.unsqueeze(1), y / spread + bias, -torch.inf).argmax(-1)
    by_rank = torch.rand(tables, 1, generator=generator) < 0.5
    by_rank = by_rank | (largest == largest[:, :1]).all(1, keepdim=True)  # one target is always the largest
    ordered = torch.where(by_rank, interval.clamp(max=count - 1), largest)
    names = torch.where(exists, torch.rand(tables, most, generator=generator), torch.inf).argsort(1).argsort(1)
    return names.gather(1, ordered)


def seen_classes(labels: Tensor, seen: Tensor) -> Tensor:
    """Which rows `[tables, rows]` have a class that a seen row has; all rows of a table whose other rows have none."""
    same = (labels.unsqueeze(2) == labels.unsqueeze(1)) & seen.unsqueeze(1)
    known = same.any(2)
    queries = known & ~seen
    return torch.where(queries.any(1, keepdim=True), known, True)
