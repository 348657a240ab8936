"""The common base of baselines, measures and displays: config chooses them, and each is for some tasks."""

from __future__ import annotations

from typing import get_args

from mlframework.episode import Kind
from mlframework.errors import UserError
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["EvaluationPart"]


class EvaluationPart:
    """A part that goes with some tasks; others are refused before anything is trained."""

    #: The kinds of task that it is for.
    kinds: tuple[Kind, ...] = get_args(Kind)

    def check(self, task: TaskDistribution) -> None:
        """Refuses a task that the part is not for.

        Raises:
            UserError: says why.
        """
        if task.spec.kind not in self.kinds:
            raise UserError(f"is for a {' or a '.join(self.kinds)}, and {type(task).__name__} is a {task.spec.kind}")
