"""Conventional estimators of scikit-learn with settings to tune, fitted to each support set."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlframework.errors import InvalidValue
from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, check_estimator, raw_inputs
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import task_values
from mlframework.inner_loop.inner_update import at_least
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Conventional", "settings_of"]


class Conventional(Baseline):
    """A classifier or a regressor by the kind of task, fitted to the raw inputs of each support set.

    Args:
        classifier, regressor: estimators of scikit-learn.
        grid: values of their settings by name; validation tasks choose. A setting that only one of the two has is left
            out for the other.
        tasks: the number of tasks on which it is judged, the first of the set; None: all.
    """

    kinds = ("classification", "regression")

    def __init__(
        self, *, classifier: Any, regressor: Any, grid: Mapping[str, Sequence[Any]], tasks: int | None = None
    ) -> None:
        self.estimators = {"classification": classifier, "regression": regressor}
        self.grid, self.tasks = grid, None if tasks is None else at_least("tasks", tasks, 1)

    def check(self, task: TaskDistribution) -> None:
        super().check(task)
        check_estimator(self.field(task), self.estimators[task.spec.kind], task)
        has = {name for each in self.estimators.values() for name in each.get_params(deep=False)}
        if unknown := [name for name in self.grid if name not in has]:
            raise InvalidValue("grid", dict(self.grid), f"no estimator has {unknown[0]}")

    def field(self, task: TaskDistribution) -> str:
        return "classifier" if task.spec.kind == "classification" else "regressor"

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        choice = trial.choose(self.candidates(trial))
        yield trial.row(name.replace("_", " "), "none", choice, tasks=self.tasks)

    def candidates(self, trial: Trial) -> Iterator[Candidate]:
        for named, estimator in settings_of(self.estimators[trial.task.spec.kind], self.grid):
            fitted = FittedEstimators(raw_inputs(), trial.task, estimator=estimator)
            yield Candidate(functools.partial(task_values, fitted, steps=0, device=trial.device), (1,), named)


def settings_of(estimator: Any, grid: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """Copies of an estimator with each combination of the settings that it has, each in words.

    >>> from sklearn.neighbors import KNeighborsRegressor
    >>> [named for named, _ in settings_of(KNeighborsRegressor(), {"n_neighbors": [1, 3], "depth": [1]})]
    ['n_neighbors=1', 'n_neighbors=3']
    """
    from sklearn.base import clone
    from sklearn.model_selection import ParameterGrid

    has = estimator.get_params(deep=False)
    for settings in ParameterGrid({name: list(values) for name, values in grid.items() if name in has}):
        named = ", ".join(f"{name}={value}" for name, value in settings.items())
        yield named, clone(estimator).set_params(**settings)
