"""The interface of all sources of ratings: who rated what, and the attributes of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlframework.errors import UserError
from mlframework.files import KeepsArguments
from mlframework.reading import read_bytes, read_text

__all__ = ["RatingSource", "Ratings", "Value", "number", "table_rows", "with_values"]

#: An attribute: a number or a category as text, or several categories.
Value = str | tuple[str, ...]

#: Attributes by name, by the user or the item that has them.
Attributes = Mapping[str, Mapping[str, Value]]


class Ratings(NamedTuple):
    """Ratings as they stand in a file; users and items without attributes may be left out of the mappings."""

    triples: Sequence[tuple[str, str, float]]  # user, item, rating
    users: Attributes
    items: Attributes


class RatingSource(KeepsArguments, ABC):
    """Where ratings come from. The constructor stores; `read` reads or draws."""

    #: Settings that say who the users and the items are; see `TaskDistribution.divided_by`.
    divided_by: tuple[str, ...] = ()

    @abstractmethod
    def read(self) -> Ratings:
        """All ratings, in the order in which they stand there.

        Raises:
            UserError: one line that names the file, the place in it, and what would be right.
        """


def table_rows(path: Path, separator: str, *, encoding: str = "utf-8") -> Iterator[tuple[str, list[str]]]:
    """The place and the fields of each line of a text file that is not empty."""
    text = read_text(path) if encoding == "utf-8" else read_bytes(path).decode(encoding)
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield f"{path}: line {number}", line.split(separator)


def number(text: str, where: str, what: str) -> float:
    """A number in a file; an error names the place."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise UserError(f"{where}: the {what} is {text!r}, and must be a number")
    return value


def with_values(names: Iterable[str], values: Iterable[Value]) -> dict[str, Value]:
    """Attributes by name; empty ones are left out."""
    return {name: value for name, value in zip(names, values, strict=True) if value}
