"""Numbers above 0 that the outer loop learns, or that stay."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from mlframework.errors import InvalidValue

__all__ = ["Positive"]


class Positive(nn.Module):
    """Named numbers above 0, each learned through its logarithm or fixed.

    Args:
        values: where each starts.
        learn: the names of those that are learned.

    >>> Positive({"c": 0.1, "reg": 1.0}, learn=["reg"])["reg"]
    tensor(1., grad_fn=<ExpBackward0>)
    """

    def __init__(self, values: Mapping[str, float], *, learn: Collection[str]) -> None:
        super().__init__()
        for name, value in values.items():
            if not 0 < value < math.inf:
                raise InvalidValue(name, value, "must be above 0")
        if not set(learn) <= set(values):
            raise InvalidValue("learn", list(learn), f"must hold some of {', '.join(values)}, or nothing")
        self.logarithms = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(v)), requires_grad=name in learn) for name, v in values.items()}
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.logarithms[name].exp()

    def __contains__(self, name: str) -> bool:
        return name in self.logarithms

    def learned(self) -> dict[str, Tensor]:
        """The values that are learned, detached."""
        return {name: log.detach().exp() for name, log in self.logarithms.items() if log.requires_grad}
