"""A check that nothing of the ratings to predict reaches training or the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import torch

from mlframework.episode import Split
from mlframework.tasks.ratings.rating_tasks import RatingTasks
from mlframework.tasks.ratings.source import Ratings, RatingSource

__all__ = ["check_leakage"]

MakeTask = Callable[[RatingSource], RatingTasks]
Pairs = set[tuple[str, str]]


def check_leakage(make_task: MakeTask, source: RatingSource, *, tasks: int = 50, seed: int = 0) -> None:
    """Raises an `AssertionError` that names a leak of the ratings that validation and test tasks ask for.

    No user of a training task is new. No rating that is asked for stands in a training task, or in the support set
    beside it. At last every rating that may be asked for is changed in the source: training tasks and all inputs must
    stay as they are, bit for bit. That finds means, counts and encodings which use these ratings, wherever they do.

    Args:
        make_task: makes the task distribution from a source of ratings.
        source: the ratings.
        tasks, seed: how many tasks of each split are drawn, and from which seed.
    """
    task = make_task(source)
    trained = pairs_of(task, "train", tasks, seed)[0] | pairs_of(task, "train", tasks, seed)[1]
    for split in ("validation", "test"):
        check_split(task, split, trained, tasks, seed)
    asked = {pair for split in ("validation", "test") for pair in asked_pairs(task, split)}
    changed = make_task(Changed(source, asked, task.per))
    splits: tuple[Split, ...] = get_args(Split)
    for split in splits:
        (one, other) = (each.sample(tasks, split, generator(seed)) for each in (task, changed))
        for part, ours, theirs in zip(("support", "query"), one, other, strict=True):
            same = torch.equal(ours.x, theirs.x) and torch.equal(ours.mask, theirs.mask)
            require(same, f"the inputs of {split} {part} sets follow from ratings that are asked for")
            if split == "train":
                require(torch.equal(ours.y, theirs.y), "training targets follow from ratings that are asked for")


def check_split(task: RatingTasks, split: Split, trained: Pairs, tasks: int, seed: int) -> None:
    """No user and no rating of a held-out split stands in training; no rating is both known and asked for."""
    if task.users == "new":
        here, there = (set(users(task, name, tasks, seed)) for name in (split, "train"))
        require(not here & there, f"{split} shares a {task.per} with train: {', '.join(sorted(here & there)[:1])}")
    _, query = pairs_of(task, split, tasks, seed)
    require(not query & trained, f"{split} asks for a rating that training shows: {sorted(query & trained)[:1]}")
    for support, asked in rows_of_tasks(task, split, tasks, seed):
        require(not support & asked, f"{split}: a rating is in both support and query")
    if task.items == "new":
        known = {item for _, item in trained}
        met = {item for _, item in query} & known
        require(not met, f"{split} asks for an item that training has met: {', '.join(sorted(met)[:1])}")


def users(task: RatingTasks, split: Split, tasks: int, seed: int) -> list[str]:
    return [name for names in task.drawn_from(tasks, split, generator(seed)) or () for name in names]


def rows_of_tasks(task: RatingTasks, split: Split, tasks: int, seed: int) -> list[tuple[set[int], set[int]]]:
    """The rows of the support and the query set of each task."""
    support, query = task.draw(tasks, split, generator(seed))
    return [(set(s[s >= 0].tolist()), set(q[q >= 0].tolist())) for s, q in zip(support, query, strict=True)]


def pairs_of(task: RatingTasks, split: Split, tasks: int, seed: int) -> tuple[Pairs, Pairs]:
    """Who rates what in the support sets, and in the query sets."""
    drawn = task.draw(tasks, split, generator(seed))
    return named(task, drawn.support[drawn.support >= 0].numpy()), named(task, drawn.query[drawn.query >= 0].numpy())


def asked_pairs(task: RatingTasks, split: Split) -> Pairs:
    """Every rating that a task of a split may ask for."""
    return set().union(*(named(task, pool.query) for pool in task.pools(split)))


def named(task: RatingTasks, rows: np.ndarray) -> Pairs:
    table = task.table
    return {(table.users.names[table.user[row]], table.items.names[table.item[row]]) for row in rows}


class Changed(RatingSource):
    """The same ratings, but for some pairs, whose rating is replaced by the next one that exists."""

    def __init__(self, source: RatingSource, pairs: Pairs, per: str) -> None:
        self.source, self.pairs, self.per = source, pairs, per

    def read(self) -> Ratings:
        ratings = self.source.read()
        grades = sorted({rating for _, _, rating in ratings.triples})
        following = dict(zip(grades, [*grades[1:], grades[0]], strict=True))

        def changed(user: str, item: str, rating: float) -> float:
            pair = (user, item) if self.per == "user" else (item, user)
            return following[rating] if pair in self.pairs else rating

        return ratings._replace(triples=[(u, i, changed(u, i, rating)) for u, i, rating in ratings.triples])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def require(condition: bool, message: str) -> None:
    """An assert that `python -O` does not leave out."""
    if not condition:
        raise AssertionError(message)
