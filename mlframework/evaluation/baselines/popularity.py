"""Popularity: what many have rated is recommended."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlframework.evaluation.baselines.rating_baseline import RatingBaseline, Setting, UserRatings
from mlframework.tasks.ratings.rating_tasks import RatingTasks

__all__ = ["Popularity"]


class Popularity(RatingBaseline):
    """Orders items by their number of training ratings; a line through the training ratings turns it into a rating."""

    def methods(self, task: RatingTasks) -> Iterator[tuple[str, list[Setting]]]:
        rows = np.flatnonzero(task.statistics.counted)
        slope, constant = np.polyfit(popularity(task, rows), task.y[rows], 1)

        def predict(user: UserRatings) -> np.ndarray:
            return constant + slope * popularity(task, user.query)

        yield "popularity", [Setting("", predict)]


def popularity(task: RatingTasks, rows: np.ndarray) -> np.ndarray:
    """The logarithm of the number of training ratings of each row's item, its own left out."""
    return np.log1p(task.statistics.item_count[task.table.item[rows]] - task.statistics.counted[rows])
