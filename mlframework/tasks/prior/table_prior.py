"""A prior over small tables: tasks drawn from generators, for networks that learn to predict tables in context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidData, InvalidValue, UserError
from mlframework.tasks.few_shot import check_at_least
from mlframework.tasks.own_data import as_numbers
from mlframework.tasks.prior.columns import as_classes, padded, scaled, seen_classes, with_categories
from mlframework.tasks.prior.table_generator import (
    TableGenerator,
    TableShape,
    checked_range,
    random_whole,
    standardised,
)
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["HasPosterior", "TablePrior"]

#: At most so many tables are drawn together, by one generator and with one number of columns.
TOGETHER = 4


@runtime_checkable
class HasPosterior(Protocol):
    """A task distribution or a generator of tables whose exact Gaussian posterior is known."""

    def posterior(self, support: Examples, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean `[tasks, m, 1]` and the variance `[tasks, m]` of the targets of queries `[tasks, m, columns]`."""


class TablePrior(TaskDistribution):
    """Draws a table for each task, some rows to learn from and some to predict.

    A table comes from one of several generators. Its inputs get categorical columns; they are then standardised by the
    support set and padded with zeros to one width. Targets are numbers, or classes: either the ranks of one target in
    intervals, or the largest of several targets, each for half of the tasks. Class numbers are permuted.

    Queries whose class is not in the support set do not count. The splits are the same distribution with other draws.

    Args:
        kind: `classification` or `regression`.
        generator: the generators, by name.
        weights: how often a generator is drawn, relative to the others, by its name; 1 where there is none.
        columns: of a table, `[low, high]`; the highest is the width that all tables are padded to.
        k_shot: support rows, `[low, high]`; drawn anew for each task, and padded.
        k_query: query rows.
        classes: of a classification, `[low, high]`.
        noise: the standard deviation of noise on targets, `[low, high]`, where a target has 1.
        categorical: the share of columns that are categorical.
        levels: of a categorical column, `[low, high]`.
        prepared: whether columns, and targets of a regression, are standardised by the support set, and columns
            multiplied by `sqrt(width / columns)`; false leaves both as the generators made them.

    Reference: Hollmann et al., TabPFN, 2023, arXiv:2207.01848, sections 4 and 5.1 and appendix C. Deviations: columns
        grow by the square root of their share, so that an embedding of them keeps its size; tables of a draw, at most
        4, share the generator and the number of columns.
    """

    def __init__(
        self,
        *,
        kind: Literal["classification", "regression"],
        generator: Mapping[str, TableGenerator],
        weights: Mapping[str, float] | None = None,
        columns: int | Sequence[int] = (1, 10),
        k_shot: int | Sequence[int] = (8, 64),
        k_query: int = 32,
        classes: int | Sequence[int] = (2, 5),
        noise: float | Sequence[float] = (0.0, 0.3),
        categorical: float = 0.15,
        levels: int | Sequence[int] = (2, 6),
        prepared: bool = True,
    ) -> None:
        check_at_least(1, k_query=k_query)
        if kind not in ("classification", "regression"):
            raise InvalidValue("kind", kind, "must be classification or regression")
        if not 0 <= categorical <= 1:
            raise InvalidValue("categorical", categorical, "must be a share of columns, from 0 to 1")
        self.generators = checked_generators(generator)
        self.weights = weights_of(self.generators, weights or {})
        self.columns = checked_range("columns", columns, least=1, whole=True)
        self.shots = checked_range("k_shot", k_shot, least=1, whole=True)
        self.classes = checked_range("classes", classes, least=2, whole=True)
        self.levels = checked_range("levels", levels, least=2, whole=True)
        self.noise = checked_range("noise", noise, least=0)
        self.k_query, self.categorical, self.prepared = k_query, categorical, prepared
        out_features = int(self.classes[1]) if kind == "classification" else 1
        ragged = kind == "classification" or self.shots[0] < self.shots[1]
        self.spec = TaskSpec(kind, (int(self.columns[1]),), out_features, ragged)

    takes_missing = True

    @property
    def scaled_by_support(self) -> bool:  # type: ignore[override]
        return self.prepared

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        """Rows of up to as many columns as the widest table; a missing value is the median of the support rows."""
        rows, width = as_numbers("x", x).double(), self.spec.x_shape[0]
        known = rows if support is None else support.double()
        if rows.dim() != 2 or rows.shape[1] > width:
            why = f"must be rows of at most {width} columns: task.columns"
            raise InvalidData("x", f"an array of shape {tuple(rows.shape)}", why)
        if rows.shape[1] != known.shape[1]:
            raise InvalidData("x", f"{rows.shape[1]} columns", f"must be {known.shape[1]}, as in the support set")
        middle = known.nanmedian(0).values.nan_to_num()
        both = torch.cat([known, rows])
        both = torch.where(both.isnan(), middle, both)
        if self.prepared:
            both = scaled(both[None], (torch.arange(len(both)) < len(known))[None])[0]
        return padded(both[len(known) :], width, rescale=self.prepared)

    def encode_targets(self, y: Any, support: Tensor | None = None) -> Tensor:
        values = super().encode_targets(y, support)
        if self.spec.kind == "classification" or not self.prepared:
            return values
        return scaled(values[None], torch.ones(1, len(values), dtype=torch.bool))[0]

    def decode_values(self, values: Tensor, support: Tensor | None = None) -> Tensor:
        if support is None or not self.prepared:
            return values
        known = support.double().view(len(support), -1)
        return values.double() * known.std(0, correction=0) + known.mean(0)

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        # A generator of its own for each split: with one seed, they would be the same tasks.
        seed = int(torch.randint(2**62, (), generator=generator)) + get_args(Split).index(split)
        own = torch.Generator().manual_seed(seed)
        sizes = [min(TOGETHER, num_tasks - start) for start in range(0, num_tasks, TOGETHER)]
        return Episode.stack([self.together(size, own) for size in sizes])

    def together(self, tables: int, generator: torch.Generator) -> Episode:
        """Tasks from one generator, with one number of columns."""
        chosen = int(torch.multinomial(self.weights, 1, generator=generator))
        targets = self.spec.out_features  # in a classification, one for each class
        columns, most = random_whole(self.columns, generator), int(self.shots[1])
        shape = TableShape(tables, most + self.k_query, columns, targets)
        x, y = list(self.generators.values())[chosen].draw(shape, generator)
        x, y = x.double(), y.double()
        check_drawn(list(self.generators)[chosen], shape, x, y)
        shots = torch.randint(int(self.shots[0]), most + 1, (tables, 1), generator=generator)
        mask = (torch.arange(shape.rows) < shots) | (torch.arange(shape.rows) >= most)
        seen = mask & (torch.arange(shape.rows) < most)
        x = with_categories(x, self.categorical, self.levels, generator)
        if self.prepared:
            x = scaled(x, seen)
        examples = self.examples(padded(x, self.spec.x_shape[0], rescale=self.prepared), y, mask, seen, generator)
        return Episode(examples.rows(slice(most)), examples.rows(slice(most, None)))

    def examples(self, x: Tensor, y: Tensor, mask: Tensor, seen: Tensor, generator: torch.Generator) -> Examples:
        """All rows of tables with their targets; `seen` `[tables, rows]`: those of the support set that count."""
        low, high = self.noise
        if high > 0:
            size = low + (high - low) * torch.rand(len(y), 1, 1, generator=generator, dtype=y.dtype)
            y = standardised(y) + size * torch.randn(y.shape, generator=generator, dtype=y.dtype)
        if self.spec.kind == "classification":
            labels = as_classes(y, self.classes, generator)
            return Examples(x.float(), labels, (mask & seen_classes(labels, seen)).float())
        if self.prepared:
            y = scaled(y, seen)
        return Examples(x.float(), y.float(), mask.float())

    def posterior(self, support: Examples, x: Tensor) -> tuple[Tensor, Tensor]:
        """The exact posterior of the prior's only generator; see `HasPosterior`.

        Raises:
            UserError: the posterior is not known.
        """
        (only, *others) = self.generators.values()
        if others or not isinstance(only, HasPosterior):
            raise UserError("the posterior is known of one generator alone: task/generator=[gaussian_process]")
        if self.spec.kind != "regression" or self.prepared or self.noise[1] > 0 or self.categorical > 0:
            wanted = "task.kind=regression task.prepared=false task.noise=0 task.categorical=0"
            raise UserError(f"the posterior is known of draws that nothing changes: {wanted}")
        return only.posterior(support, x)


def checked_generators(generators: Mapping[str, TableGenerator]) -> dict[str, TableGenerator]:
    """The generators, or a line that says what is wrong with them."""
    if not generators:
        raise InvalidValue("generator", "{}", "must hold a generator: task/generator=[network,trees]")
    for name, each in generators.items():
        if not isinstance(each, TableGenerator):
            raise InvalidValue(f"generator.{name}", each, "must be a TableGenerator, by its _target_")
    return dict(generators)


def weights_of(generators: Mapping[str, TableGenerator], weights: Mapping[str, float]) -> Tensor:
    """The weight of each generator `[generators]`, in their order."""
    for name, weight in weights.items():
        if name not in generators:
            raise InvalidValue(f"weights.{name}", weight, f"there is no such generator, but {', '.join(generators)}")
        if not weight >= 0:
            raise InvalidValue(f"weights.{name}", weight, "must be at least 0")
    found = torch.tensor([float(weights.get(name, 1.0)) for name in generators])
    if not found.sum() > 0:
        raise InvalidValue("weights", dict(weights), "must leave a generator with a weight above 0")
    return found


def check_drawn(name: str, shape: TableShape, x: Tensor, y: Tensor) -> None:
    """Refuses tables of another shape, and such with numbers that are not finite."""
    for what, values, wanted in (("x", x, shape.inputs), ("y", y, shape.outputs)):
        if tuple(values.shape) != wanted:
            raise UserError(f"task.generator.{name}: draws {what} of shape {tuple(values.shape)}, not {wanted}")
        if not torch.isfinite(values).all():
            raise UserError(f"task.generator.{name}: draws {what} that is not finite")
