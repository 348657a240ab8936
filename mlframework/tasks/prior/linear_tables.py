"""Tables with a linear law."""

from __future__ import annotations

import torch
from torch import Tensor

from mlframework.tasks.prior.table_generator import TableGenerator, TableShape, random_inputs

__all__ = ["LinearTables"]


class LinearTables(TableGenerator):
    """Targets are weighted sums of the columns; each column counts with probability `used`.

    >>> x, y = LinearTables().draw(TableShape(2, 5, 3, 1), torch.Generator().manual_seed(0))
    >>> x.shape, y.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5, 1]))
    """

    def __init__(self, *, used: float = 0.7) -> None:
        self.used = used

    def draw(self, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = random_inputs(shape, generator)
        size = (shape.tables, shape.columns, shape.targets)
        weights = torch.randn(size, generator=generator, dtype=x.dtype)
        counts = torch.rand(size, generator=generator, dtype=x.dtype) < self.used
        return x, x @ (weights * counts)
