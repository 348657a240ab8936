"""Recommendation as a task distribution: one task is one user, whose few ratings predict the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidValue
from mlframework.reading import read_once
from mlframework.screen import stage
from mlframework.tasks.few_shot import check_at_least
from mlframework.tasks.ratings.encoded import Encoded, encoded
from mlframework.tasks.ratings.ndcg import ndcg
from mlframework.tasks.ratings.partition import Items, Partition, Pool, Users
from mlframework.tasks.ratings.source import RatingSource
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Drawn", "RatingTasks", "Statistics"]

#: Losses of a residual, by name.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda prediction, y: F.mse_loss(prediction, y, reduction="none"),
    "absolute": lambda prediction, y: F.l1_loss(prediction, y, reduction="none"),
    "huber": lambda prediction, y: F.huber_loss(prediction, y, reduction="none"),
}

#: With more different ratings than these, there is no grid to round to.
MOST_GRADES = 20


class Drawn(NamedTuple):
    """The ratings of some tasks by their rows in the table, -1 for padding."""

    support: Tensor  # [tasks, n]
    query: Tensor  # [tasks, k_query]


class Statistics(NamedTuple):
    """Sums over the ratings that may be trained on."""

    counted: np.ndarray  # whether a rating is among them, [ratings]
    mean: float
    deviation: float
    item_sum: np.ndarray  # of standardised ratings, [items]
    item_count: np.ndarray  # [items]

    def item_mean(self, item: np.ndarray, shrinkage: float, without: np.ndarray | None = None) -> np.ndarray:
        """The mean standardised rating of items, shrunk towards 0 as by `shrinkage` ratings of the mean.

        `without` are the standardised ratings, nan for none, that are left out of their own item's mean.
        """
        total, count = self.item_sum[item], self.item_count[item].astype(float)
        if without is not None:
            own = ~np.isnan(without)
            total, count = total - np.where(own, without, 0), count - own
        return total / np.maximum(count + shrinkage, 1e-9)


class RatingTasks(TaskDistribution):
    """Predicts a user's ratings of some items from the same user's ratings of others.

    The target `y` is the rating, standardised by the mean and the deviation of the training ratings. The input `x` is
    a row of blocks (`spec.blocks`): the item's mean training rating and the logarithm of its count, the item's
    attributes, the user's attributes, and with `item_identity` the item itself. Item means come from training ratings
    alone. A training example's own rating is left out of its item's mean.

    Users are split by `shares`, in the order of a hash of `split_seed` and their name. Metrics are in units of the
    rating: `mae`; `mae_rounded`, of the prediction rounded to the nearest rating that exists; `rmse`, the root of each
    user's mean squared error; `ndcg`, of the user's queries (see `mlframework.tasks.ratings.ndcg`).

    **Four partitions.** `held_out_items` keeps that share of the items out of training, and `held_out_ratings` that
    share of the training users' ratings. `users` and `items` then say what validation and test queries are about. All
    support ratings are of items that training has met, unless `items` is `any`. Existing users adapt to their training
    ratings; half of them validate, and half test.

    Args:
        source: where the ratings come from.
        per: `user`; with `item` a task is an item, and users and items change places in all that is said here.
        ratings: the least and the largest number of a user's ratings (null: no bound); other users are left out.
        k_support: the largest number of support ratings; null: all that are not queries.
        k_query: the number of queries; fewer where a user has too few ratings, but for one to adapt to.
        shares: of users to train, validate and test with.
        split_seed: another one splits users, items and ratings otherwise.
        users: `new` (cold start), or `existing`.
        items: of the queries: `any`, `existing` (those of training), or `new` (held out).
        held_out_items, held_out_ratings: shares that training does not see.
        shrinkage: of the item means, in ratings.
        item_identity: whether `x` ends with a one-hot block of the item; held-out items have none.
        attributes: names of the attributes that `x` holds; null: all.
        most_values: an attribute with more categories is left out.
        loss: `squared`, `absolute` or `huber` (of standardised residuals, with its bend at 1).
        ndcg_at: places that count in nDCG.
        gain: of a rating in nDCG: `exponential` (`2^rating - 1`) or `linear` (the rating); below 0 counts as 0.

    Reference: Lee et al., MeLU, 2019, arXiv:1908.00413, section 4, for the shape of a task; the benchmark
        RecBole-MetaRec (https://github.com/RUCAIBox/RecBole-MetaRec) for users with 13 to 100 ratings, 10 of them
        queries. Deviation from MeLU: in all partitions the support ratings are of existing items, so that partitions
        differ in their queries alone.
    """

    divided_by = ("per", "ratings", "shares", "split_seed", "held_out_items", "held_out_ratings")

    def __init__(
        self,
        *,
        source: RatingSource,
        per: str = "user",
        ratings: Sequence[int | None] = (13, 100),
        k_support: int | None = None,
        k_query: int = 10,
        shares: Sequence[float] = (8, 1, 1),
        split_seed: int = 0,
        users: str = "new",
        items: str = "any",
        held_out_items: float = 0.0,
        held_out_ratings: float = 0.0,
        shrinkage: float = 5.0,
        item_identity: bool = False,
        attributes: Sequence[str] | None = None,
        most_values: int = 64,
        loss: str = "squared",
        ndcg_at: int = 5,
        gain: str = "exponential",
    ) -> None:
        check_at_least(1, k_query=k_query, ndcg_at=ndcg_at, most_values=most_values)
        if k_support is not None:
            check_at_least(1, k_support=k_support)
        self.source, self.k_support, self.k_query = source, k_support, k_query
        self.per, self.users, self.items = one_of("per", per, "user", "item"), users, items
        one_of("users", users, *get_args(Users))
        one_of("items", items, *get_args(Items))
        self.counts = bounds(ratings)
        self.shares, self.split_seed = check_shares(shares), split_seed
        self.held_out_items = share("held_out_items", held_out_items)
        self.held_out_ratings = share("held_out_ratings", held_out_ratings)
        if items == "new" and not held_out_items:
            raise InvalidValue("held_out_items", held_out_items, "must be above 0 with items=new")
        if users == "existing" and items != "new" and not held_out_ratings:
            raise InvalidValue("held_out_ratings", held_out_ratings, "must be above 0 with users=existing")
        if not shrinkage >= 0:
            raise InvalidValue("shrinkage", shrinkage, "must be at least 0")
        self.shrinkage, self.item_identity, self.most_values = shrinkage, item_identity, most_values
        self.attributes = attributes
        self.loss_of = LOSSES[one_of("loss", loss, *LOSSES)]
        self.ndcg_at, self.gain = ndcg_at, one_of("gain", gain, "exponential", "linear")
        self.higher_is_better = frozenset({"ndcg"})

    # The spec follows from the data, which is read when it is first asked for.

    @cached_property
    def spec(self) -> TaskSpec:  # type: ignore[override]
        identity = (len(self.table.items.names),) if self.item_identity else ()
        attributes = (width for _, width in (*self.table.items.blocks, *self.table.users.blocks))
        blocks = (2, *attributes, *identity)
        return TaskSpec("regression", x_shape=(sum(blocks),), out_features=1, blocks=blocks)

    def read(self) -> Encoded:
        """The encoded ratings; those of files are kept in memory for the next task of this process.

        A source of the user's own may read more than its settings and its path say, so nothing is kept of it.
        """
        form: dict[str, Any] = {"counts": self.counts, "per": self.per, "most_values": self.most_values}
        form["attributes"] = self.attributes
        path, asked = getattr(self.source, "path", None), (type(self.source), self.source.constructor_arguments, form)
        is_own = not type(self.source).__module__.startswith("mlframework.")
        if is_own or not isinstance(path, Path) or not path.exists():
            return encoded(self.source.read(), **form)
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
        return read_once(asked, sorted(files), lambda: encoded(self.source.read(), **form))

    @cached_property
    def table(self) -> Encoded:
        """All ratings of users with enough of them."""
        with stage("reading ratings"):
            table = self.read()
        if self.gain == "exponential" and table.rating.max() > 30:
            why = f"would take 2 to the power of {table.rating.max():g}, the largest rating: choose linear"
            raise InvalidValue("gain", self.gain, why)
        return table

    @cached_property
    def partition(self) -> Partition:
        held_out = {"held_out_items": self.held_out_items, "held_out_ratings": self.held_out_ratings}
        return Partition(self.table, self.shares, self.split_seed, self.users, self.items, **held_out)

    @cached_property
    def statistics(self) -> Statistics:
        trained, table = self.partition.trained, self.table
        mean, deviation = table.rating[trained].mean(), table.rating[trained].std() or 1.0
        item, y = table.item[trained], (table.rating[trained] - mean) / deviation
        size = len(table.items.names)
        total, count = np.bincount(item, y, minlength=size), np.bincount(item, minlength=size)
        return Statistics(trained, float(mean), float(deviation), total, count)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """The mean and the deviation by which ratings are standardised."""
        return self.statistics.mean, self.statistics.deviation

    def standardised(self, ratings: np.ndarray) -> np.ndarray:
        mean, deviation = self.scale
        return (ratings - mean) / deviation

    @cached_property
    def y(self) -> np.ndarray:
        """Every rating, standardised, `[ratings]`."""
        return self.standardised(self.table.rating)

    @cached_property
    def grades(self) -> Tensor | None:
        """The ratings that exist, standardised; None if there are too many."""
        found = np.unique(self.table.rating)
        if len(found) > MOST_GRADES:
            return None
        return torch.from_numpy(self.standardised(found)).float()

    def pools(self, split: Split) -> list[Pool]:
        """The tasks of a split."""
        if split not in self._pools:
            self._pools[split] = self.partition.pools(split)
        return self._pools[split]

    @cached_property
    def _pools(self) -> dict[Split, list[Pool]]:
        return {}

    # Episodes.

    @cached_property
    def support_size(self) -> int:
        """Rows of every support set, padding included."""
        splits: tuple[Split, ...] = get_args(Split)
        pools = [pool for split in splits for pool in self.pools(split)]
        largest = max(len(pool.support) - (self.queries(pool) if pool.shared else 0) for pool in pools)
        return min(largest, self.k_support or largest)

    def queries(self, pool: Pool) -> int:
        """How many ratings of a user are predicted: one at least stays to adapt to."""
        return min(self.k_query, len(pool.query), len(pool.support) - 1 if pool.shared else self.k_query)

    def draw(self, num_tasks: int, split: Split, generator: torch.Generator) -> Drawn:
        """The rows of the tasks that `sample` draws with the same arguments."""
        pools, size = self.pools(split), (self.support_size, self.k_query)
        numbers = torch.randint(len(pools), (num_tasks,), generator=generator).tolist()
        drawn = [self.draw_task(pools[number], generator) for number in numbers]
        padded = (
            torch.stack([F.pad(rows, (0, width - len(rows)), value=-1) for rows in part])
            for part, width in zip(zip(*drawn, strict=True), size, strict=True)
        )
        return Drawn(*padded)

    def draw_task(self, pool: Pool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        query, support = (torch.from_numpy(rows) for rows in (pool.query, pool.support))
        query = query[torch.randperm(len(query), generator=generator)][: self.queries(pool)]
        support = support[torch.randperm(len(support), generator=generator)]
        if pool.shared:
            support = support[~torch.isin(support, query)]
        return support[: self.support_size], query

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        return Episode(*(self.examples(rows) for rows in self.draw(num_tasks, split, generator)))

    def drawn_from(self, num_tasks: int, split: Split, generator: torch.Generator) -> list[tuple[str, ...]] | None:
        pools, names = self.pools(split), self.table.users.names
        numbers = torch.randint(len(pools), (num_tasks,), generator=generator).tolist()
        return [(names[pools[number].user],) for number in numbers]

    def examples(self, rows: Tensor) -> Examples:
        """The ratings in some rows `[tasks, n]`, -1 for padding."""
        mask = rows >= 0
        flat = rows[mask].numpy()
        x = torch.zeros(*rows.shape, *self.spec.x_shape)
        y = torch.zeros(*rows.shape, 1)
        x[mask] = torch.from_numpy(self.x(flat)).to(x)
        y[mask] = torch.from_numpy(self.y[flat]).to(y)[:, None]
        return Examples(x, y, mask.float())

    def x(self, rows: np.ndarray) -> np.ndarray:
        """The inputs `[rows, width]` of some ratings."""
        table, statistics = self.table, self.statistics
        user, item = table.user[rows], table.item[rows]
        counted = statistics.counted[rows]
        mean = statistics.item_mean(item, self.shrinkage, without=np.where(counted, self.y[rows], np.nan))
        count = np.log1p(statistics.item_count[item] - counted) / 3
        parts = [mean[:, None], count[:, None], table.items.x[item], table.users.x[user]]
        if self.item_identity:
            identity = np.zeros((len(rows), len(table.items.names)))
            identity[np.arange(len(rows)), item] = ~self.partition.new_item[item]
            parts.append(identity)
        return np.concatenate(parts, axis=1)

    # In use.

    def encode_targets(self, y: Any, support: Tensor | None = None) -> Tensor:
        mean, deviation = self.scale
        return (super().encode_targets(y, support) - mean) / deviation

    def decode_values(self, values: Tensor, support: Tensor | None = None) -> Tensor:
        mean, deviation = self.scale
        return values * deviation + mean

    def kept(self) -> dict[str, Any]:
        grades = None if self.grades is None else self.grades.tolist()
        return {"x_shape": self.spec.x_shape, "blocks": self.spec.blocks, "scale": self.scale, "grades": grades}

    def restore(self, kept: Mapping[str, Any]) -> None:
        grades = kept["grades"]
        vars(self)["spec"] = TaskSpec("regression", tuple(kept["x_shape"]), 1, blocks=tuple(kept["blocks"]))
        vars(self)["scale"] = tuple(kept["scale"])
        vars(self)["grades"] = None if grades is None else torch.tensor(grades)

    # Scores.

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return self.loss_of(prediction, y).squeeze(-1)

    def metrics(self, prediction: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = {"mae": self.errors(prediction, y).abs()}
        if self.grades is not None:
            found["mae_rounded"] = self.errors(self.rounded(prediction), y).abs()
        return found

    def scores(self, prediction: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
        squares = self.errors(prediction, y).square().masked_fill(mask == 0, 0).sum(1)
        rmse = (squares / mask.sum(1).clamp(min=1)).sqrt()
        rating = self.decode_values(y).squeeze(-1).clamp(min=0)
        gains = torch.exp2(rating) - 1 if self.gain == "exponential" else rating
        order = ndcg(prediction.squeeze(-1), gains, mask, self.ndcg_at)
        return {**super().scores(prediction, y, mask), "rmse": rmse, "ndcg": order}

    def errors(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Errors in units of the rating, `[...]`."""
        return (prediction - y).squeeze(-1) * self.scale[1]

    def rounded(self, prediction: Tensor) -> Tensor:
        """The nearest rating that exists."""
        assert self.grades is not None
        grades = self.grades.to(prediction)
        return grades[(prediction - grades).abs().argmin(-1, keepdim=True)]


def one_of(field: str, value: str, *options: str) -> str:
    if value not in options:
        raise InvalidValue(field, value, f"must be one of {', '.join(options)}")
    return value


def bounds(ratings: Sequence[int | None]) -> tuple[int, int | None]:
    pair = tuple(ratings)
    if len(pair) == 2:
        low, high = pair
        if isinstance(low, int) and low >= 2 and (high is None or (isinstance(high, int) and high >= low)):
            return low, high
    raise InvalidValue("ratings", list(ratings), "must be [low, high] with low at least 2; null for high is no bound")


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    if len(shares) != 3 or not all(value > 0 for value in shares):
        raise InvalidValue("shares", list(shares), "must be three numbers above 0: to train, validate and test")
    return tuple(shares)


def share(field: str, value: float) -> float:
    if not 0 <= value < 1:
        raise InvalidValue(field, value, "must be at least 0 and below 1")
    return value
