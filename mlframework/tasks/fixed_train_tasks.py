"""Any task distribution with a fixed number of tasks to meta-train on."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from mlframework.episode import Episode, Split
from mlframework.errors import InvalidValue
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FixedTrainTasks", "fix_train_tasks"]

Task = TypeVar("Task", bound=TaskDistribution)


def fix_train_tasks(task: Task, count: int, *, seed: int) -> Task:
    """The same task distribution, whose train split holds `count` tasks, each with one support and one query set.

    With the same seed, the first tasks of a larger number are those of a smaller one. Validation and test stay as they
    are.
    """
    if count < 1:
        raise InvalidValue("train_tasks", count, "must be at least 1, or null for new tasks in every step")
    # In the copy's own attributes: its class, by which baselines and displays know a task, stays what it is.
    same = copy.copy(task)
    vars(same)["sample"] = FixedTrainTasks(task, count, seed)
    return same


class FixedTrainTasks:
    """`sample` of a task distribution with a fixed number of training tasks; these are drawn when first asked for."""

    def __init__(self, task: TaskDistribution, count: int, seed: int) -> None:
        self.task, self.count, self.seed = task, count, seed
        self.fixed: Episode | None = None

    def __call__(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        if split != "train":
            return self.task.sample(num_tasks, split, generator)
        if self.fixed is None:
            own = torch.Generator().manual_seed(self.seed)
            self.fixed = Episode.stack([self.task.sample(1, "train", own) for _ in range(self.count)])
        return self.fixed.tasks(torch.randint(self.count, (num_tasks,), generator=generator).tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return FixedTrainTasks, (self.task, self.count, self.seed)  # without the tasks, which are drawn again
