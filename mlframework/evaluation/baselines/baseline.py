"""The interface of a baseline: a method that an evaluation judges beside the trained algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from mlframework.evaluation.part import EvaluationPart
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.trial import Trial

__all__ = ["Baseline"]


class Baseline(EvaluationPart, ABC):
    """A method that is judged beside the trained algorithm, on the same tasks."""

    @abstractmethod
    def rows(self, name: str, trial: Trial) -> Iterable[MethodResult]:
        """The rows of the report: settings chosen by `trial.choose`, judged by `trial.row`.

        Args:
            name: the baseline's key in the config.
            trial: the trained algorithm, the tasks to choose and to be judged on.
        """
