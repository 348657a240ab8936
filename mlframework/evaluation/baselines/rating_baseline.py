"""What baselines for ratings share: they see the rows of the table that a task's examples stand for."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from mlframework.errors import UserError
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet
from mlframework.meta_layers.meta_layer import Metrics
from mlframework.tasks.ratings.rating_tasks import RatingTasks
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Predictor", "RatingBaseline", "Setting", "UserRatings", "as_ratings", "drawn", "offset"]


class UserRatings(NamedTuple):
    """The rows of one task: ratings that are known, and ratings to predict."""

    support: np.ndarray
    query: np.ndarray


#: Gives standardised ratings of a task's queries `[queries]`; it may read the ratings of the support rows alone.
Predictor = Callable[[UserRatings], np.ndarray]


class Setting(NamedTuple):
    """One setting of a method, in words, and its predictor."""

    named: str
    predict: Predictor


class RatingBaseline(Baseline):
    """A method that predicts from the rows of a `RatingTasks`: who rated which item, not only `x`."""

    kinds = ("regression",)

    def check(self, task: TaskDistribution) -> None:
        as_ratings(task)

    @abstractmethod
    def methods(self, task: RatingTasks) -> Iterable[tuple[str, Iterable[Setting]]]:
        """Methods by their name in the report, each with the settings among which validation tasks choose."""

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        task, rows_of = as_ratings(trial.task), functools.cache(drawn)

        def candidate(setting: Setting) -> Candidate:
            return Candidate(lambda tasks: scores(task, rows_of(tasks), setting.predict), (1,), setting.named)

        for method, settings in self.methods(task):
            yield trial.row(method, "none", trial.choose(map(candidate, settings)))


def as_ratings(task: TaskDistribution) -> RatingTasks:
    if not isinstance(task, RatingTasks):
        raise UserError(f"is for ratings (task=ratings), and {type(task).__name__} has none")
    return task


def drawn(tasks: TaskSet) -> list[UserRatings]:
    """The rows of every task of a set."""
    task, generator = as_ratings(tasks.task), torch.Generator().manual_seed(tasks.seed)
    draws = (task.draw(1, tasks.split, generator) for _ in range(tasks.tasks))
    return [UserRatings(*(rows[rows >= 0].numpy() for rows in draw)) for draw in draws]


def scores(task: RatingTasks, ratings: list[UserRatings], predict: Predictor) -> Metrics:
    """The query metrics `[1, tasks]` of a predictor."""
    size = (len(ratings), task.k_query, 1)
    prediction, y, mask = torch.zeros(size), torch.zeros(size), torch.zeros(size[:2])
    for row, user in enumerate(ratings):
        count = len(user.query)
        prediction[row, :count, 0] = torch.from_numpy(np.asarray(predict(user)))
        y[row, :count, 0] = torch.from_numpy(task.y[user.query])
        mask[row, :count] = 1
    return {f"query_{name}": value[None] for name, value in task.scores(prediction, y, mask).items()}


def offset(residuals: np.ndarray, shrinkage: float) -> float:
    """The mean of residuals, shrunk towards 0 as by so many residuals of 0."""
    return float(residuals.sum() / (len(residuals) + shrinkage)) if len(residuals) + shrinkage else 0.0
