"""Conventional estimators of scikit-learn with settings to tune, fitted to each support set."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.errors import InvalidValue
from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, check_estimator, raw_inputs
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import task_values
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import BatchNormPolicy
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Conventional", "Grid", "settings_of"]

#: Values of settings by name, of which every combination is tried; or several of these, one after the other.
Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]]

#: Settings of a grid that are none of an estimator's.
OWN = ("scaled", "constant")


class Conventional(Baseline):
    """A classifier or a regressor by the kind of task, fitted to the raw inputs of each support set.

    Args:
        classifier, regressor: estimators of scikit-learn.
        grid: values of their settings by name, or a list of such grids; validation tasks choose. A setting that only
            one of the two has is left out for the other. Two are no settings of theirs: `scaled` brings each input to
            mean 0 and variance 1 over the support set, `constant` adds an input of 1, whose coefficient a linear model
            without an intercept shrinks as the others.
        tasks: the number of tasks on which it is judged, the first of the set; None: all.
    """

    kinds = ("classification", "regression")

    def __init__(self, *, classifier: Any, regressor: Any, grid: Grid, tasks: int | None = None) -> None:
        self.estimators = {"classification": classifier, "regression": regressor}
        self.grid, self.tasks = grid, None if tasks is None else at_least("tasks", tasks, 1)

    def check(self, task: TaskDistribution) -> None:
        super().check(task)
        check_estimator(self.field(task), self.estimators[task.spec.kind], task)
        has = {*OWN} | {name for each in self.estimators.values() for name in each.get_params(deep=False)}
        for grid in grids_of(self.grid):
            if unknown := [name for name in grid if name not in has]:
                raise InvalidValue("grid", grid, f"no estimator has {unknown[0]}")

    def field(self, task: TaskDistribution) -> str:
        return "classifier" if task.spec.kind == "classification" else "regressor"

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        choice = trial.choose(self.candidates(raw_inputs(), trial, "support"))
        yield trial.row(name.replace("_", " "), "none", choice, tasks=self.tasks)

    def candidates(self, base_layer: BaseLayer, trial: Trial, batch_norm: BatchNormPolicy) -> Iterator[Candidate]:
        """Each setting, to be judged on the features of a base layer."""
        for named, estimator in settings_of(self.estimators[trial.task.spec.kind], self.grid):
            fitted = FittedEstimators(base_layer, trial.task, estimator=estimator, batch_norm=batch_norm)
            fitted.engine = trial.meta_layer.engine
            yield Candidate(functools.partial(task_values, fitted, steps=0, device=trial.device), (1,), named)


def grids_of(grid: Grid) -> list[dict[str, list[Any]]]:
    grids = [grid] if isinstance(grid, Mapping) else grid
    return [{name: list(values) for name, values in each.items()} for each in grids]


def settings_of(estimator: Any, grid: Grid) -> Iterator[tuple[str, Any]]:
    """Copies of an estimator with each combination of the settings that it has, each in words.

    >>> from sklearn.neighbors import KNeighborsRegressor
    >>> [named for named, _ in settings_of(KNeighborsRegressor(), {"n_neighbors": [1, 3], "depth": [1]})]
    ['n_neighbors=1', 'n_neighbors=3']
    """
    from sklearn.base import clone
    from sklearn.model_selection import ParameterGrid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    has = {*estimator.get_params(deep=False), *OWN}
    known = [{name: values for name, values in each.items() if name in has} for each in grids_of(grid)]
    for settings in ParameterGrid(known):
        named = ", ".join(f"{name}={value}" for name, value in settings.items())
        before = [StandardScaler()] if settings.pop("scaled", False) else []
        before += [PolynomialFeatures(1)] if settings.pop("constant", False) else []  # the inputs and a 1
        own = clone(estimator).set_params(**settings)
        yield named, make_pipeline(*before, own) if before else own
