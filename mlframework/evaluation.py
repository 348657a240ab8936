"""Honest evaluation: a frozen, hashed set of tasks, metrics after every inner step, intervals over tasks, baselines beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from mlframework.episode import Episode, Split
from mlframework.errors import InvalidValue
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Interval", "TaskSet", "judge_by_step"]


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval over tasks, by Student's t.

    Attributes:
        mean: of the values.
        half_width: `mean - half_width` to `mean + half_width` is the interval; not a number for a single value.
        count: how many values.
    """

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """The interval of a sample `[count]`."""
        count = len(values)
        values = values.double()
        if count < 2:
            return cls(float(values.mean()), float("nan"), count)
        quantile = float(stats.t.ppf(0.975, count - 1))
        return cls(float(values.mean()), quantile * float(values.std()) / count**0.5, count)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half_width:.4f}"


class TaskSet:
    """Tasks that are always the same: drawn from their own generator, in chunks, whatever the training drew.

    Args:
        task: the distribution.
        split: which tasks.
        tasks: how many.
        seed: of the draws; same seed, same tasks, on any machine.
        chunk: tasks at a time.
    """

    def __init__(self, task: TaskDistribution, split: Split, *, tasks: int, seed: int, chunk: int = 50) -> None:
        for field, value in {"tasks": tasks, "chunk": chunk}.items():
            if value < 1:
                raise InvalidValue(field, value, "must be at least 1")
        self.task, self.split, self.size, self.seed, self.chunk = task, split, tasks, seed, chunk

    def __iter__(self) -> Iterator[Episode]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.size, self.chunk):
            yield self.task.sample(min(self.chunk, self.size - start), self.split, generator)


def judge_by_step(
    meta_layer: MetaLayer, episode: Episode, steps: int, batch_norm: BatchNormPolicy | None = None
) -> Metrics:
    """Query metrics after 0, 1, ..., `steps` inner steps: each `[steps + 1, tasks]` (one row where nothing is stepped)."""
    meta_layer.eval()
    with torch.no_grad():
        rows = [
            meta_layer.judge(adapted, episode, batch_norm) for adapted in meta_layer.trajectory(episode.support, steps)
        ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
