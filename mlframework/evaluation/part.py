"""The interfaces of baselines and measures, and their common base with displays: config chooses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import get_args

from mlframework.episode import Kind, Split
from mlframework.errors import UserError
from mlframework.evaluation.choices import Trial
from mlframework.evaluation.report import Measured, MethodResult
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Baseline", "EvaluationPart", "Measure"]


class EvaluationPart:
    """A part that goes with some tasks; others are refused before anything is trained."""

    #: The kinds of task that it is for.
    kinds: tuple[Kind, ...] = get_args(Kind)

    def check(self, task: TaskDistribution) -> None:
        """Refuses a task that the part is not for: a `UserError` says why."""
        if task.spec.kind not in self.kinds:
            raise UserError(f"is for a {' or a '.join(self.kinds)}, and {type(task).__name__} is a {task.spec.kind}")


class Baseline(EvaluationPart, ABC):
    """A method that an evaluation judges beside the trained algorithm, on the same tasks."""

    @abstractmethod
    def rows(self, name: str, trial: Trial) -> Iterable[MethodResult]:
        """Rows of the report: settings chosen by `trial.choose`, judged by `trial.row`; `name` is its config key."""


class Measure(EvaluationPart, ABC):
    """A table about a quality that no query metric shows, as that of generated texts."""

    @abstractmethod
    def measure(self, meta_layer: MetaLayer, split: Split, steps: int) -> Measured | None:
        """Intervals by column and row after some inner steps on tasks of a split; None if nothing can be measured."""
