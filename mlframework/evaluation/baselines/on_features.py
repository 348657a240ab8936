"""scikit-learn on the meta-trained features."""

from __future__ import annotations

from collections.abc import Iterator

from mlframework.evaluation.baselines.baseline import Baseline
from mlframework.evaluation.baselines.fitted_estimators import Estimator, check_estimator, tuned
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.trial import Trial
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["OnFeatures"]


class OnFeatures(Baseline):
    """scikit-learn estimators, each fitted to the features of the base layer as they are before it adapts.

    Args:
        estimators: by name; a row of the report for each.
    """

    def __init__(self, **estimators: Estimator) -> None:
        self.estimators = estimators

    def check(self, task: TaskDistribution) -> None:
        for name, estimator in self.estimators.items():
            check_estimator(name, estimator, task)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        layer = trial.meta_layer
        for each, estimator in self.estimators.items():
            choice = trial.choose(tuned(estimator, layer.base_layer, trial, layer.batch_norm))
            yield trial.row(f"{each} on features", trial.shown(layer.batch_norm), choice)
