"""Means of ratings, each shrunk towards the one before: global, item, user, attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from mlframework.evaluation.baselines.rating_baseline import RatingBaseline, Setting, UserRatings, offset
from mlframework.tasks.ratings.rating_tasks import RatingTasks

__all__ = ["RatingMeans", "attribute_offsets", "categories"]

NAMES = ("global mean", "item mean", "item and user means", "item and user means, attribute offsets")


class RatingMeans(RatingBaseline):
    """Four methods, each of which adds a term to the one before it.

    The global mean of the training ratings; the item's mean deviation from it; the user's mean residual; and for each
    category of the item's attributes the user's mean residual there. A mean over `n` values is `sum / (n + k)`.

    Args:
        item, user, attributes: values of `k` to choose among, at each level.
    """

    def __init__(self, *, item: Sequence[float], user: Sequence[float], attributes: Sequence[float]) -> None:
        self.grids = (tuple(item), tuple(user), tuple(attributes))

    def methods(self, task: RatingTasks) -> Iterator[tuple[str, Iterator[Setting]]]:
        for levels, name in enumerate(NAMES):
            if levels < 3 or categories(task).shape[1]:
                yield name, self.settings(task, levels)

    def settings(self, task: RatingTasks, levels: int) -> Iterator[Setting]:
        for chosen in product(*self.grids[:levels]):
            named = ", ".join(f"{k}={v:g}" for k, v in zip(("item", "user", "attributes"), chosen, strict=False))
            yield Setting(named, lambda user, chosen=chosen: predicted(task, user, *chosen))  # type: ignore[misc]


def predicted(task: RatingTasks, user: UserRatings, *shrinkage: float) -> np.ndarray:
    """Standardised ratings of the queries, from as many levels as there are shrinkages."""
    prediction = np.zeros(len(user.query))
    if not shrinkage:
        return prediction
    of_item = item_means(task, shrinkage[0])
    prediction, residuals = prediction + of_item(user.query), task.y[user.support] - of_item(user.support)
    if len(shrinkage) > 1:
        shift = offset(residuals, shrinkage[1])
        prediction, residuals = prediction + shift, residuals - shift
    if len(shrinkage) > 2:
        prediction = prediction + attribute_offsets(task, user, residuals, shrinkage[2])
    return prediction


def item_means(task: RatingTasks, shrinkage: float):  # type: ignore[no-untyped-def]
    statistics = task.statistics

    def of(rows: np.ndarray) -> np.ndarray:
        own = np.where(statistics.counted[rows], task.y[rows], np.nan)
        return statistics.item_mean(task.table.item[rows], shrinkage, without=own)

    return of


def categories(task: RatingTasks) -> np.ndarray:
    """The shares of categories of all items' attributes, `[items, categories]`; numbers are left out."""
    items = task.table.items
    parts = [items.block(name) for name, width in items.blocks if width > 1]
    return np.concatenate([np.zeros((len(items.names), 0)), *parts], axis=1)


def attribute_offsets(task: RatingTasks, user: UserRatings, residuals: np.ndarray, shrinkage: float) -> np.ndarray:
    """For each query the mean of its categories' offsets, `[queries]`."""
    shares, item = categories(task), task.table.item
    has = shares[item[user.support]] > 0
    offsets = (has * residuals[:, None]).sum(0) / np.maximum(has.sum(0) + shrinkage, 1e-9)
    return shares[item[user.query]] @ offsets
