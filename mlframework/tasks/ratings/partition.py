"""Which ratings train, which adapt and which are asked for: users, items and ratings held out, without overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from mlframework.episode import Split
from mlframework.errors import UserError
from mlframework.tasks.ratings.encoded import Encoded

__all__ = ["Items", "Partition", "Pool", "Users"]

Users = Literal["new", "existing"]
Items = Literal["any", "existing", "new"]


class Pool(NamedTuple):
    """The rows of one user that may be drawn."""

    user: int
    support: np.ndarray
    query: np.ndarray
    shared: bool  # whether rows stand in both, so that each task divides them anew


@dataclass(frozen=True)
class Partition:
    """The parts of a table of ratings; see `RatingTasks` for the settings."""

    table: Encoded
    shares: Sequence[float]
    split_seed: int
    users: str
    items: str
    held_out_items: float
    held_out_ratings: float

    @cached_property
    def split_of_user(self) -> np.ndarray:
        """0, 1, 2 for users of training, validation and test, `[users]`."""
        count, total = len(self.table.users.names), sum(self.shares)
        order = np.argsort([self.hashed("user", name) for name in self.table.users.names])
        to_train, to_validate = (int(sum(self.shares[:i]) / total * count + 1e-9) for i in (1, 2))  # rounded down
        split = np.full(count, 2)
        split[order[:to_validate]] = 1
        split[order[:to_train]] = 0
        return split

    @cached_property
    def half_of_user(self) -> np.ndarray:
        """1 for training users that validate as existing ones, 2 for those that test, `[users]`."""
        return np.array([1 + (self.hashed("half", name) < 0.5) for name in self.table.users.names])

    @cached_property
    def new_item(self) -> np.ndarray:
        """Whether an item is held out of training, `[items]`."""
        return np.array([self.hashed("item", name) < self.held_out_items for name in self.table.items.names])

    @cached_property
    def trained(self) -> np.ndarray:
        """Whether a rating may be trained on, `[ratings]`."""
        table = self.table
        names = ((table.users.names[u], table.items.names[i]) for u, i in zip(table.user, table.item, strict=True))
        held_out = np.array([self.hashed("rating", f"{user}:{item}") < self.held_out_ratings for user, item in names])
        trained = (self.split_of_user[table.user] == 0) & ~self.new_item[table.item] & ~held_out
        if not trained.any():
            raise UserError("task: no rating is left to train on: lower held_out_items or held_out_ratings")
        return trained

    def hashed(self, what: str, name: str) -> float:
        """A number in [0, 1) that stands for a user, an item or a rating under this split seed, on any machine."""
        digest = hashlib.sha256(f"{self.split_seed}/{what}/{name}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    def candidates(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Whether each rating may be support, and whether it may be a query, `[ratings]` each."""
        trained, new = self.trained, self.new_item[self.table.item]
        asked = {"any": np.ones_like(new), "existing": ~new, "new": new}[self.items]
        if split == "train":
            return trained, trained
        place = 1 if split == "validation" else 2
        if self.users == "existing":
            mine = ((self.split_of_user == 0) & (self.half_of_user == place))[self.table.user]
            return mine & trained, mine & ~trained & asked
        mine = (self.split_of_user == place)[self.table.user]
        return (mine if self.items == "any" else mine & ~new), mine & asked

    def pools(self, split: Split) -> list[Pool]:
        """The users of a split with a rating to adapt to and another one to predict."""
        support, query = self.candidates(split)
        found = []
        for user, rows in enumerate(self.rows_of_user):
            known, asked = rows[support[rows]], rows[query[rows]]
            shared = bool(np.isin(asked, known).any())
            if len(asked) and len(known) > shared:
                found.append(Pool(user, known, asked, shared))
        if not found:
            raise UserError(f"task: no user of the {split} split has a rating to adapt to and another one to predict")
        return found

    @cached_property
    def rows_of_user(self) -> list[np.ndarray]:
        order = np.argsort(self.table.user, kind="stable")
        sizes = np.bincount(self.table.user, minlength=len(self.table.users.names))
        return np.split(order, np.cumsum(sizes)[:-1])
