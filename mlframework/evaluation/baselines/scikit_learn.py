"""scikit-learn, fitted to each support set: on raw inputs, which is conventional learning, and on trained features."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mlframework.episode import Kind
from mlframework.evaluation.baselines.fitted_estimators import (
    Estimator,
    FittedEstimators,
    check_estimator,
    judged,
    raw_inputs,
    tuned,
)
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.trial import Trial
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["OnFeatures", "ScikitLearn", "default_estimator"]

log = logging.getLogger(__name__)


class ScikitLearn(Baseline):
    """A scikit-learn estimator, fitted to the raw inputs of each support set; there is none for sequences.

    Args:
        estimator: is judged as it is; None takes one by the kind of task, and tunes it.
    """

    def __init__(self, *, estimator: Estimator | None = None) -> None:
        self.estimator = estimator

    def check(self, task: TaskDistribution) -> None:
        if self.estimator is not None:
            check_estimator("estimator", self.estimator, task)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        kind = trial.task.spec.kind
        if kind not in FittedEstimators.kinds:
            log.warning("%s: left out, it has no estimator for a %s", name, kind)
            return
        estimator, inputs = self.estimator or default_estimator(kind), raw_inputs()
        own = [judged("", estimator, inputs, trial, "support")] if self.estimator else None
        choice = trial.choose(own or tuned(estimator, inputs, trial, "support"))
        yield trial.row(f"scikit-learn {type(estimator).__name__}", "none", choice)


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


def default_estimator(kind: Kind) -> Estimator:
    """Logistic regression for a classification, kernel ridge regression (RBF) for a regression."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import LogisticRegression

    if kind == "classification":
        return LogisticRegression(max_iter=1000)
    return KernelRidge(kernel="rbf", alpha=0.1, gamma=0.5)
