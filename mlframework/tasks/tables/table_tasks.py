"""Tasks that are groups of rows, which share their columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split
from mlframework.errors import InvalidValue
from mlframework.tasks.few_shot import check_at_least, shot_range
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["GroupedRows", "TableTasks"]

#: Rows of the support set: a number, the least and the most of a random number, or a share of the task's rows.
Shots = int | float | Sequence[int]


class GroupedRows(NamedTuple):
    """The rows of the tasks of a split, which stand task by task."""

    x: Tensor  # [rows, d]
    y: Tensor  # [rows, 1] for a regression, else class ids [rows]
    sizes: Tensor  # rows of each task [tasks], at least 2
    names: tuple[str, ...]  # of each task
    sources: tuple[str, ...]  # of each task: itself, or the group that it belongs to


class TableTasks(TaskDistribution):
    """Draws a task, then rows of it without replacement: `k_shot` support rows, of the others `k_query` query rows.

    Tasks have as many rows as the table gives them: the mask says which count. At least one row is left to query.

    Args:
        k_shot: support rows: a number, `[low, high]` to draw it anew for every task, or a share below 1 of its rows.
        k_query: query rows at most; None: all that are left.
    """

    def __init__(self, *, k_shot: Shots, k_query: int | None) -> None:
        if isinstance(k_shot, float):
            if not 0 < k_shot < 1:
                raise InvalidValue(
                    "k_shot", k_shot, "must be a number of rows, [low, high], or a share between 0 and 1"
                )
        else:
            shot_range(k_shot)
        if k_query is not None:
            check_at_least(1, k_query=k_query)
        self.k_shot, self.k_query = k_shot, k_query

    @abstractmethod
    def rows(self, split: Split) -> GroupedRows:
        """The rows of a split."""

    @property
    @abstractmethod
    def largest(self) -> tuple[int, int]:
        """The most support rows and the most query rows of any task: episodes are padded to that."""

    def shots(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The fewest and the most support rows of tasks with `sizes` `[...]` rows."""
        if isinstance(self.k_shot, float):
            share = (self.k_shot * sizes).round().long().clamp(min=1)
            return torch.minimum(share, sizes - 1), torch.minimum(share, sizes - 1)
        low, high = shot_range(self.k_shot)
        return (sizes - 1).clamp(max=low), (sizes - 1).clamp(max=high)

    def largest_of(self, sizes: Tensor) -> tuple[int, int]:
        """`largest` for tasks of these sizes."""
        low, high = self.shots(sizes)
        queries = int((sizes - low).max())
        return int(high.max()), queries if self.k_query is None else min(queries, self.k_query)

    def is_ragged(self, sizes: Tensor) -> bool:
        """Whether some episode of tasks of these sizes has padding."""
        (low, high), (most_support, most_query) = self.shots(sizes), self.largest_of(sizes)
        return bool((low < most_support).any() or (sizes - high < most_query).any())

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        rows = self.rows(split)
        drawn = self.drawn_numbers(num_tasks, split, generator)
        sizes = rows.sizes[drawn]
        low, high = self.shots(sizes)
        span = high - low + 1
        shots = low + (torch.rand(num_tasks, generator=generator, dtype=torch.float64) * span).long()
        order = shuffled(sizes, int(rows.sizes.max()), generator) + (rows.sizes.cumsum(0) - rows.sizes)[drawn, None]
        most_support, most_query = self.largest
        support = torch.arange(most_support).expand(num_tasks, -1)
        query = shots[:, None] + torch.arange(most_query)
        return Episode(
            picked(rows, order, support, support < shots[:, None]), picked(rows, order, query, query < sizes[:, None])
        )

    def drawn_numbers(self, num_tasks: int, split: Split, generator: torch.Generator) -> Tensor:
        """The numbers of the drawn tasks, `[tasks]`."""
        return torch.randint(len(self.rows(split).sizes), (num_tasks,), generator=generator)

    def drawn_from(self, num_tasks: int, split: Split, generator: torch.Generator) -> list[tuple[str, ...]] | None:
        sources = self.rows(split).sources
        return [(sources[number],) for number in self.drawn_numbers(num_tasks, split, generator).tolist()]


def shuffled(sizes: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """The integers below each of `sizes` `[tasks]` in random order, `[tasks, most]`; what follows them is no such."""
    keys = torch.rand(len(sizes), most, generator=generator, dtype=torch.float64)
    return torch.where(torch.arange(most) < sizes[:, None], keys, 2.0).argsort(dim=1, stable=True)


def picked(rows: GroupedRows, order: Tensor, places: Tensor, counts: Tensor) -> Examples:
    """The rows at `places` `[tasks, n]` of the tasks' `order` `[tasks, most]`; those that do not count are a first row.

    Padding repeats a row of the task, so that it has values of the table's range.
    """
    numbers = order.gather(1, torch.where(counts, places, 0))
    return Examples(rows.x[numbers], rows.y[numbers], counts.float())
