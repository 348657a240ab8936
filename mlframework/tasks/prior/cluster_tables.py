"""Tables whose rows fall into clusters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlframework.tasks.prior.table_generator import TableGenerator, TableShape, checked_range, log_uniform, random_whole

__all__ = ["ClusterTables"]


class ClusterTables(TableGenerator):
    """Rows are drawn from clusters; targets are values of the cluster, with a small linear trend inside it.

    Args:
        clusters: one number or `[low, high]`; drawn for all tables of a draw together.
        distance: the standard deviation of the clusters' centres, where that of rows in a cluster is about 1.
        trend: how much of a target is linear in the columns.
    """

    def __init__(
        self,
        *,
        clusters: int | Sequence[int] = (2, 8),
        distance: float | Sequence[float] = (0.3, 3.0),
        trend: float = 0.1,
    ) -> None:
        self.clusters = checked_range("clusters", clusters, least=1, whole=True)
        self.distance, self.trend = checked_range("distance", distance, least=1e-3), trend

    def draw(self, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tables, rows, columns, targets = shape
        clusters = random_whole(self.clusters, generator)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        cluster = torch.randint(clusters, (tables, rows, 1), generator=generator)
        distance = log_uniform(*self.distance, (tables, 1, 1), generator)
        spread = log_uniform(0.4, 2.0, (tables, clusters, columns), generator)
        centre = (distance * normal(tables, clusters, columns)).gather(1, cluster.expand(-1, -1, columns))
        x = centre + normal(*shape.inputs) * spread.gather(1, cluster.expand(-1, -1, columns))
        value = normal(tables, clusters, targets).gather(1, cluster.expand(-1, -1, targets))
        return x, value + self.trend * (x @ normal(tables, columns, targets))
