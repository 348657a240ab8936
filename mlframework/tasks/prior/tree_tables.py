"""Tables whose law is a sum of decision trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlframework.tasks.prior.table_generator import (
    TableGenerator,
    TableShape,
    checked_range,
    random_inputs,
    random_whole,
)

__all__ = ["TreeTables"]


class TreeTables(TableGenerator):
    """Targets are sums over complete binary trees with random columns, thresholds and leaves.

    A threshold is the value of a random row, so that most nodes split the rows.

    Args:
        trees: of a sum, one number or `[low, high]`; drawn for all tables of a draw together, as is the depth.
        depth: of a tree.
    """

    def __init__(self, *, trees: int | Sequence[int] = (1, 8), depth: int | Sequence[int] = (1, 4)) -> None:
        self.trees = checked_range("trees", trees, least=1, whole=True)
        self.depth = checked_range("depth", depth, least=1, whole=True)

    def draw(self, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = random_inputs(shape, generator)
        trees, depth = (random_whole(bounds, generator) for bounds in (self.trees, self.depth))
        tables, rows, columns, targets = shape
        inner = (tables, trees * (2**depth - 1))
        column = torch.randint(columns, inner, generator=generator)
        row = torch.randint(rows, inner, generator=generator)
        threshold = x[torch.arange(tables)[:, None], row, column].unflatten(1, (trees, -1))
        leaf = leaves_reached(x, column.unflatten(1, (trees, -1)), threshold, depth)
        values = torch.randn(tables, trees, 2**depth, targets, generator=generator, dtype=x.dtype)
        chosen = leaf.unsqueeze(-1).expand(-1, -1, -1, targets)
        return x, values.gather(2, chosen).sum(1)


def leaves_reached(x: Tensor, column: Tensor, threshold: Tensor, depth: int) -> Tensor:
    """The number of the leaf that each row `[tables, rows, columns]` reaches in each tree, `[tables, trees, rows]`.

    Nodes `[tables, trees, nodes]` stand as in a heap: after node `i` comes `2 i + 1`, or `2 i + 2` above the threshold.
    """
    node = torch.zeros(column.shape[0], column.shape[1], x.shape[1], dtype=torch.int64)
    for _ in range(depth):
        value = at(x, column.gather(2, node))
        node = 2 * node + 1 + (value > threshold.gather(2, node)).long()
    return node - (2**depth - 1)


def at(x: Tensor, column: Tensor) -> Tensor:
    """Each row's value in a column of its own: `[tables, rows, columns]` and `[tables, trees, rows]` to the latter."""
    return x.gather(2, column.transpose(1, 2)).transpose(1, 2)
