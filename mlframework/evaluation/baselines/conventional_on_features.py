"""Conventional estimators on the features of a network that was trained conventionally on the training tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlframework.evaluation.baselines.conventional import Conventional, Grid
from mlframework.evaluation.baselines.pretraining import AfterPretraining, Pretraining
from mlframework.evaluation.choices import Trial
from mlframework.evaluation.report import MethodResult
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ConventionalOnFeatures"]


class ConventionalOnFeatures(AfterPretraining):
    """A classifier or a regressor, fitted to the features of each support set; validation tasks choose the network too.

    Args:
        classifier, regressor, grid, tasks: see `Conventional`.
        pretraining: how the network was trained.
    """

    kinds = Conventional.kinds

    def __init__(
        self, *, classifier: Any, regressor: Any, grid: Grid, pretraining: Pretraining, tasks: int | None = None
    ) -> None:
        super().__init__(pretraining)
        self.conventional = Conventional(classifier=classifier, regressor=regressor, grid=grid, tasks=tasks)

    def check(self, task: TaskDistribution) -> None:
        self.conventional.check(task)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        policy = trial.meta_layer.batch_norm
        found = (
            candidate._replace(named=f"{candidate.named}, {network.named}")
            for network in self.pretraining.networks(trial)
            for candidate in self.conventional.candidates(network.base_layer, trial, policy)
        )
        choice = trial.choose(found)
        yield trial.row(name.replace("_", " "), trial.shown(policy), choice, tasks=self.conventional.tasks)
