"""Few-shot tasks from the small tables that scikit-learn ships: nothing to download."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidValue, nearest
from mlframework.tasks.few_shot import check_at_least, distinct, shot_range
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["SklearnTables", "WholeTable", "by_support"]

#: The sets and whether they have classes; `diabetes` has a number to predict in their place.
SETS = {"iris": True, "wine": True, "breast_cancer": True, "digits": True, "diabetes": False}

#: A column is used if it has at least this many values, none of which is in more than half of the rows.
LEAST_VALUES = 10
#: Standardised numbers are cut off here: a small support set may hold nearly one value.
CLIP = 5.0


class WholeTable(NamedTuple):
    """A set of scikit-learn, with the columns that vary."""

    name: str
    x: Tensor  # [rows, columns], float64
    labels: Tensor  # classes [rows]; all 0 where the set has none


class SklearnTables(TaskDistribution):
    """A task is a part of a table: some of its columns in random order, and a question about them.

    A classification draws `n_way` classes, numbered anew in every task. A regression draws a column that is predicted
    from the others; the class, or the target of diabetes, is not used. So a table gives thousands of tasks, and a
    network must read from the support set what the columns mean.

    Each split has tables of its own. The support set alone standardises columns and the target: nothing is known of a
    new table. Columns that hardly vary are left out, as the pixels in the corners of digits.

    Args:
        kind: `classification` or `regression`.
        columns: inputs of a task.
        n_way: classes of a classification.
        k_shot: support rows of each class, or support rows of a regression; `[low, high]` draws it anew for every task.
        k_query: query rows of each class, or of a regression.
        train, validation, test: the tables of each split: iris, wine, breast_cancer, digits, diabetes.

    >>> task = SklearnTables(columns=3, k_shot=5)
    >>> task.sample(2, "test", torch.Generator().manual_seed(0)).support.x.shape
    torch.Size([2, 10, 3])
    """

    divided_by = ("train", "validation")  # test tables are in neither

    def __init__(
        self,
        *,
        kind: Literal["classification", "regression"] = "classification",
        columns: int = 3,
        n_way: int = 2,
        k_shot: int | Sequence[int] = 5,
        k_query: int = 10,
        train: Sequence[str] = ("digits", "breast_cancer"),
        validation: Sequence[str] = ("iris",),
        test: Sequence[str] = ("wine",),
    ) -> None:
        if kind not in ("classification", "regression"):
            raise InvalidValue("kind", kind, "must be classification or regression")
        check_at_least(2, n_way=n_way)
        check_at_least(1, columns=columns, k_query=k_query)
        self.columns, self.n_way, self.shots, self.k_query = columns, n_way, shot_range(k_shot), k_query
        self.names: dict[Split, list[str]] = {"train": list(train), "validation": list(validation), "test": list(test)}
        for split, names in self.names.items():
            self.check_names(split, names, kind)
        ragged, outputs = self.shots[0] < self.shots[1], n_way if kind == "classification" else 1
        self.spec = TaskSpec(kind, (columns,), outputs, ragged)
        self._tables: dict[Split, list[WholeTable]] = {}

    def check_names(self, split: Split, names: Sequence[str], kind: str) -> None:
        known = [name for name, has_classes in SETS.items() if has_classes or kind == "regression"]
        if not names or (unknown := [name for name in names if name not in known]):
            hint = nearest(unknown[0], known) if names else ""
            raise InvalidValue(split, list(names), f"must hold some of {', '.join(known)}{hint} for a {kind}")
        for other in get_args(Split)[: get_args(Split).index(split)]:
            if shared := set(names) & set(self.names[other]):
                raise InvalidValue(split, list(names), f"{min(shared)} is in the {other} split as well")

    def tables(self, split: Split) -> list[WholeTable]:
        """The tables of a split; each is large enough."""
        if split not in self._tables:
            self._tables[split] = [self.checked(loaded(name)) for name in self.names[split]]
        return self._tables[split]

    def checked(self, table: WholeTable) -> WholeTable:
        sizes, is_regression = table.labels.bincount(), self.spec.kind == "regression"
        most = table.x.shape[1] - is_regression
        if self.columns > most:
            raise InvalidValue("columns", self.columns, f"{table.name} has {most} that vary")
        if not is_regression and self.n_way > len(sizes):
            raise InvalidValue("n_way", self.n_way, f"{table.name} has {len(sizes)} classes")
        rows = len(table.x) if is_regression else int(sizes.min())
        if self.shots[1] + self.k_query > rows:
            where = f"{table.name} has {rows} rows" + ("" if is_regression else " of its smallest class")
            raise InvalidValue("k_query", self.k_query, f"{where}, and {self.shots[1]} are support rows")
        return table

    scaled_by_support = True

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        rows = super().encode_inputs(x, support)
        return by_support(rows, rows if support is None else support.double())

    def encode_targets(self, y: Any, support: Tensor | None = None) -> Tensor:
        values = super().encode_targets(y, support)
        return by_support(values, values) if self.spec.kind == "regression" else values

    def decode_values(self, values: Tensor, support: Tensor | None = None) -> Tensor:
        if support is None:
            return values
        mean, std = scale_of(support.double().view(len(support), -1))
        return values.double() * std + mean

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        draw = self.draw_classes if self.spec.kind == "classification" else self.draw_column
        return Episode.stack([draw(self.drawn_table(split, generator), generator) for _ in range(num_tasks)])

    def drawn_table(self, split: Split, generator: torch.Generator) -> WholeTable:
        tables = self.tables(split)
        return tables[int(torch.randint(len(tables), (), generator=generator))]

    def draw_classes(self, table: WholeTable, generator: torch.Generator) -> Episode:
        """One task: `n_way` classes in some of the columns, `[1, n, ...]`; rows stand shot by shot."""
        columns = distinct(torch.tensor(table.x.shape[1]), self.columns, generator)
        classes = distinct(torch.tensor(int(table.labels.max()) + 1), self.n_way, generator)
        wanted = self.shots[1] + self.k_query
        rows = [torch.nonzero(table.labels == label).flatten() for label in classes]
        picked = torch.stack([each[distinct(torch.tensor(len(each)), wanted, generator)] for each in rows])
        x = table.x[picked.T.flatten()][:, columns]
        return self.episode(x, torch.arange(self.n_way).repeat(wanted), self.n_way, generator)

    def draw_column(self, table: WholeTable, generator: torch.Generator) -> Episode:
        """One task: a column from some of the others, `[1, n, ...]`."""
        columns = distinct(torch.tensor(table.x.shape[1]), self.columns + 1, generator)
        rows = distinct(torch.tensor(len(table.x)), self.shots[1] + self.k_query, generator)
        x = table.x[rows][:, columns]
        return self.episode(x[:, 1:], x[:, :1], 1, generator)

    def episode(self, x: Tensor, y: Tensor, per_shot: int, generator: torch.Generator) -> Episode:
        """Rows of one task, support first, standardised by the support rows that count."""
        low, high = self.shots
        shots = int(torch.randint(low, high + 1, (), generator=generator)) if low < high else high
        known = x[: shots * per_shot]
        x = by_support(x, known).float()
        if self.spec.kind == "regression":
            y = by_support(y, y[:shots]).float()
        mask = torch.ones(len(x))
        mask[shots * per_shot : high * per_shot] = 0
        examples = Examples(x[None], y[None], mask[None])
        return Episode(examples.rows(slice(high * per_shot)), examples.rows(slice(high * per_shot, None)))


def by_support(values: Tensor, support: Tensor) -> Tensor:
    """Values `[n, d]`, standardised by the support rows `[m, d]` and cut off.

    A column that is constant there, as with a single row, has no scale but its size.
    """
    mean, std = scale_of(support)
    return ((values - mean) / std).clamp(-CLIP, CLIP)


def scale_of(support: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the scale of each column of rows `[m, d]`."""
    mean, std = support.mean(0), support.std(0, correction=0)
    return mean, torch.where(std > 1e-9 * mean.abs(), std, mean.abs().clamp(min=1e-9))


def loaded(name: str) -> WholeTable:
    """A set by its name."""
    from sklearn import datasets  # here: it takes a second, and every other task would pay it

    load: Callable[..., Any] = getattr(datasets, f"load_{name}")
    x, y = load(return_X_y=True)
    labels = y.astype(np.int64) if SETS[name] else np.zeros(len(y), dtype=np.int64)
    return WholeTable(name, torch.from_numpy(np.stack(list(varying(x)), axis=1)), torch.from_numpy(labels))


def varying(x: np.ndarray) -> Iterator[np.ndarray]:
    """The columns that vary enough to be inputs and targets."""
    for column in x.astype(np.float64).T:
        counts = np.unique(column, return_counts=True)[1]
        if len(counts) >= LEAST_VALUES and counts.max() <= len(column) / 2:
            yield column
