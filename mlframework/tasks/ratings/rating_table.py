"""Ratings in a table of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.reading import parsed_csv, read_text
from mlframework.tasks.data_folder import missing
from mlframework.tasks.ratings.source import Ratings, RatingSource, Value, number

__all__ = ["RatingTable"]


NEEDED = "must name a CSV with a line for each rating"


class RatingTable(RatingSource):
    """A CSV with a header and a rating per line: columns of the user, the item, the rating, and attributes of both.

    Args:
        path: the file, in UTF-8.
        user, item, rating: the names of the three columns.
        user_attributes, item_attributes: names of columns with attributes; the last line of a user or an item counts.
        list_separator: separates several categories in one field, as in `comedy|crime`.
    """

    divided_by = ("user", "item")

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        user: str = "user",
        item: str = "item",
        rating: str = "rating",
        user_attributes: Sequence[str] = (),
        item_attributes: Sequence[str] = (),
        list_separator: str = "|",
    ) -> None:
        if path is None:
            raise InvalidValue("path", path, NEEDED)
        if not list_separator:
            raise InvalidValue("list_separator", "''", "must be at least one character")
        self.path, self.columns = Path(path).expanduser(), (user, item, rating)
        self.user_attributes, self.item_attributes = tuple(user_attributes), tuple(item_attributes)
        self.list_separator = list_separator

    def read(self) -> Ratings:
        if not self.path.exists():
            raise InvalidValue("path", self.path, missing(self.path, "file", NEEDED))
        user, item, rating = self.columns
        triples = []
        users: dict[str, dict[str, Value]] = {}
        items: dict[str, dict[str, Value]] = {}
        for where, row in fields_of(self.path, self.needed()):
            if not (row[user] and row[item]):
                raise UserError(f"{where}: has no {item if row[user] else user}")
            triples.append((row[user], row[item], number(row[rating], where, rating)))
            users[row[user]] = self.values(row, self.user_attributes)
            items[row[item]] = self.values(row, self.item_attributes)
        if not triples:
            raise UserError(f"{self.path}: holds no ratings")
        return Ratings(triples, users, items)

    def needed(self) -> dict[str, str]:
        """Every column by the setting that names it."""
        three = dict(zip(("user", "item", "rating"), self.columns, strict=True))
        both = (("user_attributes", self.user_attributes), ("item_attributes", self.item_attributes))
        return {column: key for key, column in three.items()} | {c: key for key, columns in both for c in columns}

    def values(self, row: Mapping[str, str], columns: Sequence[str]) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for column in columns:
            if text := row[column]:
                several = tuple(filter(None, (part.strip() for part in text.split(self.list_separator))))
                found[column] = several if self.list_separator in text else text
        return found


def fields_of(path: Path, needed: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The place and the fields of each line by column, without white space around them."""
    rows = parsed_csv(read_text(path), str(path))
    _, columns = next(rows, (0, []))
    for column, key in needed.items():
        if column not in columns:
            why = f"is no column of {path}{nearest(column, columns)}; there are {', '.join(columns)}"
            raise UserError(f"task.source.{key}={column}: {why}")
    for line, row in rows:
        where = f"{path}: line {line}"
        if row and len(row) != len(columns):
            raise UserError(f"{where}: has another number of fields than the header, {len(columns)}")
        if row:
            yield where, {name: value.strip() for name, value in zip(columns, row, strict=True)}
