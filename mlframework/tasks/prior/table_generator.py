"""The interface of generators of tables, and what several of them use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.errors import InvalidValue
from mlframework.files import KeepsArguments

__all__ = [
    *("TableGenerator", "TableShape", "checked_range", "log_uniform", "one_of"),
    *("random_inputs", "random_whole", "standardised"),
]


class TableShape(NamedTuple):
    """The sizes of tables that are drawn together."""

    tables: int
    rows: int
    columns: int
    targets: int  # numbers that each row's target is made from

    @property
    def inputs(self) -> tuple[int, int, int]:
        return self.tables, self.rows, self.columns

    @property
    def outputs(self) -> tuple[int, int, int]:
        return self.tables, self.rows, self.targets


class TableGenerator(KeepsArguments, ABC):
    """Draws synthetic tables: each has a law of its own, which all of its rows follow."""

    @abstractmethod
    def draw(self, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs `shape.inputs` and targets `shape.outputs`; all randomness comes from `generator`.

        Scales do not matter: a `TablePrior` brings inputs and targets to a common one, unless it is told not to.
        """


def random_inputs(shape: TableShape, generator: torch.Generator) -> Tensor:
    """Inputs `shape.inputs` in float64: correlated columns, each normal, uniform, heavy-tailed or skewed."""
    tables, _, columns, _ = shape
    normal = torch.randn(shape.inputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(tables, columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    share = torch.rand(tables, 1, 1, generator=generator, dtype=torch.float64)
    z = standardised((1 - share) * normal + share * (normal @ mixing))
    forms = torch.stack([z, torch.special.ndtr(z), z * z.abs().sqrt(), (0.7 * z).exp()])
    return standardised(one_of(forms, generator, (tables, 1, columns)))


def one_of(forms: Tensor, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """One of several forms `[forms, ...]` of the same numbers, drawn anew for each element of `shape`: `[...]`."""
    drawn = torch.randint(len(forms), shape, generator=generator)
    return forms.gather(0, drawn.expand(forms.shape[1:])[None])[0]


def standardised(values: Tensor) -> Tensor:
    """Values `[tables, rows, ...]` with mean 0 and standard deviation 1 over rows; constants become 0."""
    values = values - values.mean(1, keepdim=True)
    return values / values.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def log_uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers between two bounds above 0, uniform in their logarithm, float64."""
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.tensor(low, dtype=torch.float64) * (torch.tensor(high / low, dtype=torch.float64) ** share)


def random_whole(bounds: tuple[float, float], generator: torch.Generator) -> int:
    """A whole number from the first bound to the last."""
    low, high = bounds
    return int(torch.randint(int(low), int(high) + 1, (), generator=generator))


def checked_range(
    field: str, value: float | Sequence[float], *, least: float, whole: bool = False
) -> tuple[float, float]:
    """`[low, high]` of a setting that may be one number, of at least `least`."""
    pair = (value, value) if isinstance(value, int | float) else tuple(value)
    kind: tuple[type, ...] = (int,) if whole else (int, float)
    if len(pair) == 2 and all(type(bound) in kind for bound in pair) and least <= pair[0] <= pair[1]:
        return pair
    numbers = "whole numbers" if whole else "numbers"
    raise InvalidValue(field, value, f"must be a number of at least {least:g}, or [low, high], two such {numbers}")
