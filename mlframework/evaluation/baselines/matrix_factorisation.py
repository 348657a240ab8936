"""Matrix factorisation of the training ratings; a new user's factors are folded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlframework.evaluation.baselines.rating_baseline import RatingBaseline, Setting, UserRatings
from mlframework.evaluation.baselines.rating_means import item_means
from mlframework.inner_loop.inner_update import at_least
from mlframework.tasks.ratings.rating_tasks import RatingTasks

__all__ = ["MatrixFactorisation", "fold_in"]


class MatrixFactorisation(RatingBaseline):
    """Factorises the residuals of the item means by alternating least squares: `y_ui = mean_i + <p_u, (1, q_i)>`.

    The first factor of an item is the constant 1, so that a user's first factor is the user's own offset. A new user's
    factors are the ridge regression of the support residuals on the factors of their items.

    Args:
        factors: numbers of factors to choose among, the constant not counted.
        penalties: of the squared factors, in squared errors, to choose among.
        rounds: of alternating least squares.
        seed: of the first factors.

    Reference: Koren, Bell, Volinsky, Matrix Factorization Techniques for Recommender Systems, 2009,
        doi:10.1109/MC.2009.263; alternating least squares as in Zhou et al. 2008, doi:10.1007/978-3-540-68880-8_32,
        with a penalty that does not grow with the number of ratings.
    """

    def __init__(self, *, factors: Sequence[int], penalties: Sequence[float], rounds: int, seed: int) -> None:
        self.factors, self.penalties = [at_least("factors", f, 1) for f in factors], list(penalties)
        self.rounds, self.seed = at_least("rounds", rounds, 1), seed

    def methods(self, task: RatingTasks) -> Iterator[tuple[str, Iterator[Setting]]]:
        yield "matrix factorisation, user folded in", self.settings(task)

    def settings(self, task: RatingTasks) -> Iterator[Setting]:
        of_item = item_means(task, task.shrinkage)
        for factors in self.factors:
            for penalty in self.penalties:
                items = self.factorised(task, factors, penalty)

                def predict(user: UserRatings, items: np.ndarray = items, penalty: float = penalty) -> np.ndarray:
                    known, asked = (items[task.table.item[rows]] for rows in user)
                    residuals = task.y[user.support] - of_item(user.support)
                    return of_item(user.query) + asked @ fold_in(known, residuals, penalty)

                yield Setting(f"factors={factors}, penalty={penalty:g}", predict)

    def factorised(self, task: RatingTasks, factors: int, penalty: float) -> np.ndarray:
        """The items' factors `[items, 1 + factors]`, the first of which is 1; 0 for an item without ratings."""
        rows = np.flatnonzero(task.statistics.counted)
        residuals = task.y[rows] - item_means(task, task.shrinkage)(rows)
        by_user, by_item = (grouped(of[rows]) for of in (task.table.user, task.table.item))
        rng = np.random.default_rng(self.seed)
        q = np.zeros((len(task.table.items.names), factors))
        q[by_item.keys] = rng.normal(size=(len(by_item.keys), factors)) * 0.1
        p = np.zeros((len(task.table.users.names), 1 + factors))
        for _ in range(self.rounds):
            for user, members in zip(by_user.keys, by_user.members, strict=True):
                p[user] = fold_in(with_constant(q[task.table.item[rows[members]]]), residuals[members], penalty)
            for item, members in zip(by_item.keys, by_item.members, strict=True):
                known = p[task.table.user[rows[members]]]
                q[item] = fold_in(known[:, 1:], residuals[members] - known[:, 0], penalty)
        return with_constant(q)


class Grouped(NamedTuple):
    keys: np.ndarray
    members: list[np.ndarray]  # the places of each key


def grouped(keys: np.ndarray) -> Grouped:
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    return Grouped(found, np.split(order, starts[1:]))


def with_constant(q: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(q), 1)), q], axis=1)


def fold_in(factors: np.ndarray, residuals: np.ndarray, penalty: float) -> np.ndarray:
    """The ridge regression `[d]` of residuals `[n]` on factors `[n, d]`."""
    return np.linalg.solve(factors.T @ factors + penalty * np.eye(factors.shape[1]), factors.T @ residuals)
