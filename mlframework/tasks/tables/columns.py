"""Columns of a table: what kind of cells they hold, and their encoding as numbers, which training rows decide."""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from numbers import Number
from typing import Any, Literal, NamedTuple

import numpy as np

from mlframework.errors import UserError

__all__ = ["Categories", "Column", "Numbers", "Reading", "fitted", "leave_out", "read_column"]

#: Cells that stand for a missing value, in lower case.
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "."})
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
COMMAS = re.compile(r"[+-]?\d{1,3}([.,]\d{3})*(,\d+)?|[+-]?\d+,\d+")
DATE = re.compile(r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})([T ]\d{1,2}:\d{2}.*)?")
#: A column of so few texts holds categories, whatever they look like.
FEW = 10
#: The most one-hot numbers of a column; rarer categories share one. Standardised numbers are cut off at `CLIP`.
MOST_CATEGORIES, CLIP = 50, 5.0


class Reading(NamedTuple):
    """How cells are read."""

    missing: Collection[str] = ()  # further cells that stand for a missing value
    categories: Collection[str] = ()  # columns of categories, though their cells are numbers
    decimal: str = "."


class Column(NamedTuple):
    """A column whose cells are read."""

    name: str
    kind: Literal["number", "category", "date", "empty"]
    values: np.ndarray  # [rows]: float64, NaN where missing; or strings, None where missing

    @property
    def missing(self) -> np.ndarray:
        """Where nothing stands, `[rows]`."""
        return np.isnan(self.values) if self.kind == "number" else np.array([value is None for value in self.values])


def read_column(name: str, cells: Sequence[Any], reading: Reading) -> Column:
    """A column with its kind.

    Raises:
        UserError: most of its cells are numbers, of many values, and one is not.
    """
    marks = MISSING | {mark.lower() for mark in reading.missing}
    kept = [None if is_missing(cell, marks) else cell for cell in cells]
    there = [cell for cell in kept if cell is not None]
    texts = np.array([None if cell is None else str(cell) for cell in kept], dtype=object)
    if not there:
        return Column(name, "empty", texts)
    if name in reading.categories:
        return Column(name, "category", texts)
    numbers = [None if cell is None else as_number(cell, reading.decimal) for cell in kept]
    count = sum(number is not None for number in numbers)
    if count == len(there):
        return Column(name, "number", np.array([math.nan if n is None else n for n in numbers]))
    if 2 * count >= len(there) and len(set(texts)) > FEW:
        row = next(i for i, cell in enumerate(kept) if cell is not None and numbers[i] is None)
        remedy = f"task.missing=[{kept[row]}] if it is missing, task.categories=[{name}] if these are categories"
        raise UserError(f"{name} holds numbers, but for {str(kept[row])!r} in row {row + 1}: {remedy}")
    if reading.decimal == "." and all(COMMAS.fullmatch(str(cell)) for cell in there):
        raise UserError(f"{name} holds numbers with commas, such as {str(there[0])!r}: 'task.decimal=\",\"' reads them")
    return Column(name, "date" if all(map(is_date, there)) else "category", texts)


def is_missing(cell: Any, marks: Collection[str]) -> bool:
    if isinstance(cell, str):
        return cell.lower() in marks
    return cell is None or cell != cell


def as_number(cell: Any, decimal: str) -> float | None:
    """The number in a cell; None if it holds no finite one. A truth value is a category."""
    if isinstance(cell, str):
        text = cell if decimal == "." else cell.replace(".", "").replace(decimal, ".")
        return float(text) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else None
    if isinstance(cell, Number) and not isinstance(cell, bool | complex) and math.isfinite(float(cell)):  # type: ignore[arg-type]
        return float(cell)  # type: ignore[arg-type]
    return None


def is_date(cell: Any) -> bool:
    return isinstance(cell, datetime.date) or DATE.fullmatch(str(cell)) is not None


def leave_out(column: Column, train: np.ndarray, *, named: bool) -> str | None:
    """Why a column cannot help, by its training rows `train`; None if it can. One that the user `named` may be odd."""
    if column.kind in ("empty", "date"):
        return {"empty": "no value", "date": "dates"}[column.kind]
    if len(set(column.values[train & ~column.missing])) + bool(column.missing[train].any()) < 2:
        return "one value in all training tasks"
    return None if named else oddity(column.kind, column.values[~column.missing])


def oddity(kind: str, values: np.ndarray) -> str | None:
    """What an identifier looks like."""
    if kind == "category":
        return "a different text in most rows" if len(set(values)) > max(2 * FEW, len(values) // 2) else None
    grows = len(values) > FEW and (np.diff(values) > 0).all() and (values == np.round(values)).all()
    return "a number that grows from row to row" if grows else None


class Numbers(NamedTuple):
    """Encodes a number: standardised, the mean where it is missing, and a mark of that."""

    name: str
    mean: float
    std: float
    marks_missing: bool  # whether a second number says that the value is missing

    @property
    def names(self) -> list[str]:
        return [self.name, f"{self.name} missing"] if self.marks_missing else [self.name]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """`[rows, len(names)]` for values `[rows]`."""
        missing = np.isnan(values)
        standard = np.where(missing, 0.0, (values - self.mean) / self.std).clip(-CLIP, CLIP)
        return np.stack([standard, missing][: len(self.names)], axis=1)


class Categories(NamedTuple):
    """Encodes a category as one-hot; one that no training row has counts as a rare one, or has zeros alone."""

    name: str
    categories: tuple[str | None, ...]  # None: the missing value
    others: bool  # whether rare categories share a last number

    @property
    def names(self) -> list[str]:
        shown = ["missing" if category is None else f"= {category}" for category in self.categories]
        return [f"{self.name} {each}" for each in (*shown, *(["= another"] if self.others else []))]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """`[rows, len(names)]` for values `[rows]`."""
        number = {category: i for i, category in enumerate(self.categories)}
        places = np.array([number.get(value, len(self.categories)) for value in values], dtype=np.int64)
        return np.eye(len(self.categories) + 1)[places][:, : len(self.names)]


def fitted(column: Column, train: np.ndarray) -> Numbers | Categories:
    """The encoding of a column by its training rows `train` `[rows]`, which are true."""
    values = column.values[train]
    if column.kind == "number":
        there = values[~np.isnan(values)]
        return Numbers(column.name, float(there.mean()), float(there.std()) or 1.0, len(there) < len(values))
    counts = Counter(values.tolist())
    order = sorted(counts, key=lambda category: (-counts[category], category is None, category or ""))
    if len(order) <= MOST_CATEGORIES:
        return Categories(column.name, tuple(order), others=False)
    return Categories(column.name, tuple(order[: MOST_CATEGORIES - 1]), others=True)
