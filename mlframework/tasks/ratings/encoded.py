"""Ratings as tensors: users and items by number, their attributes as blocks of numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.tasks.ratings.source import Attributes, Ratings, Value

__all__ = ["Encoded", "Entities", "encoded"]

log = logging.getLogger(__name__)

#: An attribute is a number if this share of its values are.
NUMBERS = 0.9


class Entities(NamedTuple):
    """All users, or all items, by number."""

    names: tuple[str, ...]
    x: np.ndarray  # attributes [entities, sum of widths]
    blocks: tuple[tuple[str, int], ...]  # the name and the width of each attribute

    def block(self, name: str) -> np.ndarray:
        """The columns of one attribute, `[entities, width]`."""
        start = 0
        for other, width in self.blocks:
            if other == name:
                return self.x[:, start : start + width]
            start += width
        raise KeyError(name)


class Encoded(NamedTuple):
    """Ratings in columns, each `[ratings]`; no pair of a user and an item stands twice."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    rating: np.ndarray  # float64
    users: Entities
    items: Entities

    def swapped(self) -> Encoded:
        """The same ratings with users in the place of items."""
        return Encoded(self.item, self.user, self.rating, self.items, self.users)


def encoded(
    ratings: Ratings,
    *,
    counts: tuple[int, int | None],
    per: str,
    most_values: int,
    attributes: Sequence[str] | None = None,
) -> Encoded:
    """Numbers users and items, leaves out users with too few or too many ratings, and encodes attributes.

    Of several ratings of one item by one user, the last counts.

    Args:
        counts: the least and the largest number of a user's ratings; None: no bound.
        per: `user`, or `item`, which lets the two change places.
        most_values: an attribute with more categories is left out.
        attributes: the names of those to encode; None: all.
    """
    check_attributes(ratings, attributes)
    last = {(user, item): rating for user, item, rating in ratings.triples}
    if repeated := len(ratings.triples) - len(last):
        log.warning("%d ratings are of an item that the same user rated before: the last one counts", repeated)
    least, most = counts
    of_task = Counter(pair[per == "item"] for pair in last)
    kept = {name for name, count in of_task.items() if count >= least and (most is None or count <= most)}
    rows = [(user, item, rating) for (user, item), rating in last.items() if (user, item)[per == "item"] in kept]
    if not rows:
        bounds = f"[{least}, {'null' if most is None else most}]"
        raise UserError(f"task.ratings={bounds}: no {per} of {len(of_task)} has as many ratings")
    users, items, values = zip(*rows, strict=True)
    found = []
    for column, described in ((users, ratings.users), (items, ratings.items)):
        names = sorted(set(column))
        numbers = {name: i for i, name in enumerate(names)}
        kept_of = {name: wanted(described.get(name, {}), attributes) for name in names}
        found.append((np.array([numbers[name] for name in column]), entities(names, kept_of, most_values)))
    (user, of_user), (item, of_item) = found
    table = Encoded(user, item, np.array(values, dtype=np.float64), of_user, of_item)
    return table if per == "user" else table.swapped()


def wanted(described: Mapping[str, Value], attributes: Sequence[str] | None) -> Mapping[str, Value]:
    return {key: value for key, value in described.items() if attributes is None or key in attributes}


def check_attributes(ratings: Ratings, attributes: Sequence[str] | None) -> None:
    """Refuses the name of an attribute that nobody has."""
    both = (*ratings.users.values(), *ratings.items.values())
    there = dict.fromkeys(key for described in both for key in described)
    for name in attributes or ():
        if name not in there:
            why = f"nothing has an attribute {name}{nearest(name, there)}; there are {', '.join(there) or 'none'}"
            raise InvalidValue("attributes", list(attributes or ()), why)


def entities(names: Sequence[str], attributes: Attributes, most_values: int) -> Entities:
    keys = dict.fromkeys(key for name in names for key in attributes.get(name, ()))
    blocks: list[tuple[str, np.ndarray]] = []
    for key in keys:
        block = encode([attributes.get(name, {}).get(key, "") for name in names], most_values)
        if block is None:
            log.info("the attribute %s has more than %d categories: left out", key, most_values)
        elif block.shape[1]:
            blocks.append((key, block))
    x = np.concatenate([np.zeros((len(names), 0)), *(block for _, block in blocks)], axis=1)
    return Entities(tuple(names), x, tuple((key, block.shape[1]) for key, block in blocks))


def encode(values: Sequence[Value], most_values: int) -> np.ndarray | None:
    """One attribute `[entities, width]`: a standardised number, or a share for each category; 0 where it is missing.

    A category is one-hot, and several of one entity have equal shares that add up to 1. None: too many categories.
    """
    if (numbers := as_numbers(values)) is not None:
        mean, deviation = np.nanmean(numbers), np.nanstd(numbers)
        return np.nan_to_num((numbers - mean) / (deviation or 1.0))[:, None]
    sets = [value if isinstance(value, tuple) else (value,) if value else () for value in values]
    categories = sorted({category for each in sets for category in each})
    if len(categories) > most_values:
        return None
    column = {category: i for i, category in enumerate(categories)}
    block = np.zeros((len(sets), len(categories)))
    for row, each in enumerate(sets):
        for category in each:
            block[row, column[category]] += 1 / len(each)
    return block


def as_numbers(values: Sequence[Value]) -> np.ndarray | None:
    """The values as numbers `[entities]`, nan where there is none; None if fewer than `NUMBERS` of those given are.

    So one misprint does not make a thousand categories of a year.
    """
    given = [value for value in values if value]
    if any(isinstance(value, tuple) for value in given):
        return None
    numbers = np.array([as_number(value) if isinstance(value, str) else np.nan for value in values])
    return numbers if given and np.isfinite(numbers).sum() >= NUMBERS * len(given) else None


def as_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return np.nan
    return value if np.isfinite(value) else np.nan
