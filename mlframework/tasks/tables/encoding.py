"""A whole table as numbers, and predictions in the table's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlframework.errors import UserError
from mlframework.tasks.tables.columns import Categories, Column, Numbers

__all__ = ["TableEncoding", "class_names", "texts_of"]


class TableEncoding(NamedTuple):
    """The encoding of each input and of the target."""

    inputs: list[Numbers | Categories]
    target: Numbers | list[str]  # of a regression, or the names of the classes

    def x(self, columns: Sequence[Column]) -> Tensor:
        """The inputs `[rows, d]` of columns, in any order."""
        values = {column.name: column.values for column in columns}
        return torch.from_numpy(
            np.concatenate([each.encode(values[each.name]) for each in self.inputs], axis=1)
        ).float()

    def y(self, target: Column) -> Tensor:
        """Standardised numbers `[rows, 1]`, or the numbers of classes `[rows]`."""
        if isinstance(self.target, Numbers):
            return torch.from_numpy((target.values - self.target.mean) / self.target.std).float()[:, None]
        number, found = {name: i for i, name in enumerate(self.target)}, texts(target)
        if unknown := [text for text in found if text not in number]:
            raise UserError(f"{target.name} holds {unknown[0]!r}, and the classes are {', '.join(self.target)}")
        return torch.tensor([number[text] for text in found])

    def as_json(self) -> dict[str, Any]:
        return {"inputs": [[type(each).__name__, *each] for each in self.inputs], "target": list(self.target)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TableEncoding:
        """The encoding that `as_json` described."""
        inputs: list[Numbers | Categories] = []
        for kind, *fields in content["inputs"]:
            if kind == "Numbers":
                inputs.append(Numbers(*fields))
            else:
                name, categories, others = fields
                inputs.append(Categories(name, tuple(categories), others))
        target = content["target"]
        of_numbers = len(target) == len(Numbers._fields) and isinstance(target[-1], bool)
        return cls(inputs, Numbers(*target) if of_numbers else target)

    def decode(self, prediction: Tensor) -> list[float] | list[str]:
        """Numbers, or the likeliest classes, for predictions `[n, out_features]`."""
        if isinstance(self.target, Numbers):
            return (prediction[:, 0].double() * self.target.std + self.target.mean).tolist()
        return [self.target[number] for number in prediction.argmax(-1).tolist()]


def class_names(target: Column) -> list[str]:
    return sorted(set(texts(target)))


def texts(column: Column) -> list[str]:
    """The cells of a column as texts; whole numbers without a point."""
    return texts_of(column.values)


def texts_of(values: np.ndarray) -> list[str]:
    """Values as texts; whole numbers without a point."""
    if values.dtype.kind not in "fiu":
        return [str(value) for value in values]
    return [str(int(value)) if value == int(value) else str(value) for value in values.tolist()]
