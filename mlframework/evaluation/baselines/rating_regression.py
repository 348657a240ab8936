"""scikit-learn's regressions on ratings: one for each user, and one for all users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlframework.evaluation.baselines.rating_baseline import RatingBaseline, Setting, UserRatings, drawn, offset
from mlframework.evaluation.baselines.rating_means import attribute_offsets, item_means
from mlframework.evaluation.baselines.scikit_learn import check_estimator
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop.inner_update import at_least
from mlframework.tasks.ratings.rating_tasks import RatingTasks
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["OnAllUsers", "OnEachUser"]

Grid = Mapping[str, Sequence[Any]]


class Estimators(RatingBaseline):
    """scikit-learn estimators by name, each tuned over the settings of `grid` that it has."""

    def __init__(self, *, grid: Grid, estimators: Mapping[str, Any]) -> None:
        self.grid, self.estimators = grid, estimators

    def check(self, task: TaskDistribution) -> None:
        super().check(task)
        for name, estimator in self.estimators.items():
            check_estimator(name, estimator, task)

    def settings(self, estimator: Any) -> Iterator[tuple[str, Any]]:
        """Copies of an estimator with each setting, in words."""
        from sklearn.base import clone
        from sklearn.model_selection import ParameterGrid

        has = estimator.get_params(deep=False)
        for chosen in ParameterGrid({name: list(values) for name, values in self.grid.items() if name in has}):
            yield ", ".join(f"{name}={value}" for name, value in chosen.items()), clone(estimator).set_params(**chosen)


class OnEachUser(Estimators):
    """Regressions of each user's own residuals from the item means on `x` and a constant; no other user is seen.

    Args:
        grid: values of the estimators' settings to choose among.
        estimators: scikit-learn regressions, by their name in the report.
    """

    def __init__(self, *, grid: Grid, **estimators: Any) -> None:
        super().__init__(grid=grid, estimators=estimators)

    def methods(self, task: RatingTasks) -> Iterator[tuple[str, Iterator[Setting]]]:
        for name, estimator in self.estimators.items():
            yield f"{name} on each user", self.of_user(task, estimator)

    def of_user(self, task: RatingTasks, estimator: Any) -> Iterator[Setting]:
        of_item = item_means(task, task.shrinkage)
        for named, fresh in self.settings(estimator):

            def predict(user: UserRatings, fresh: Any = fresh) -> np.ndarray:
                known, asked = (np.insert(task.x(rows), 0, 1.0, axis=1) for rows in user)
                fitted = fresh.fit(known, task.y[user.support] - of_item(user.support))
                return of_item(user.query) + np.asarray(fitted.predict(asked)).ravel()

            yield Setting(named, predict)


class OnAllUsers(Estimators):
    """One regression for all users, on `x` and numbers that describe the user's support ratings.

    These are the shrunken mean of the residuals from the item means, the logarithm of their number, and the offsets of
    the item's categories (see `RatingMeans`). It is fitted to draws of the training tasks.

    Args:
        grid, estimators: see `OnEachUser`.
        draws: of each training user, on average.
        shrinkage: of the user's mean and of the offsets, in ratings.
        seed: of the draws.
    """

    def __init__(self, *, grid: Grid, draws: int, shrinkage: float, seed: int, **estimators: Any) -> None:
        super().__init__(grid=grid, estimators=estimators)
        self.draws, self.shrinkage, self.seed = at_least("draws", draws, 1), at_least("shrinkage", shrinkage, 0), seed

    def methods(self, task: RatingTasks) -> Iterator[tuple[str, Iterator[Setting]]]:
        count = self.draws * len(task.pools("train"))
        users = drawn(TaskSet(task, "train", tasks=count, seed=self.seed))
        x = np.concatenate([self.inputs(task, user) for user in users])
        y = np.concatenate([task.y[user.query] for user in users])
        for name, estimator in self.estimators.items():
            yield f"{name} on all users", self.fitted(task, estimator, x, y)

    def fitted(self, task: RatingTasks, estimator: Any, x: np.ndarray, y: np.ndarray) -> Iterator[Setting]:
        for named, fresh in self.settings(estimator):
            fresh.fit(x, y)
            yield Setting(named, lambda user, fresh=fresh: fresh.predict(self.inputs(task, user)))  # type: ignore[misc]

    def inputs(self, task: RatingTasks, user: UserRatings) -> np.ndarray:
        """The inputs of a task's queries, `[queries, d]`."""
        residuals = task.y[user.support] - item_means(task, task.shrinkage)(user.support)
        shift = offset(residuals, self.shrinkage)
        by_category = attribute_offsets(task, user, residuals - shift, self.shrinkage)
        of_user = np.tile([shift, np.log1p(len(user.support))], (len(user.query), 1))
        return np.concatenate([task.x(user.query), of_user, by_category[:, None]], axis=1)
