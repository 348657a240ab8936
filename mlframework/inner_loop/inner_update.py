"""The interface of inner update rules: how parameters move, given the gradient of the support loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mlframework.episode import Params
from mlframework.errors import InvalidValue

__all__ = ["InnerUpdate", "at_least", "fraction", "positive", "zeros"]

N = TypeVar("N", int, float)


class InnerUpdate(nn.Module, ABC):
    """A differentiable update rule. Its own parameters, such as learned rates, are meta-parameters.

    Its constructor's first argument is the dictionary of parameters it will move, of one task, as in `torch.optim`; its
    `lr` is the inner rate.
    """

    def init(self, params: Params) -> Any:
        """The state before the first step; empty for a rule without memory."""
        return ()

    def learned(self) -> dict[str, Tensor]:
        """Its learned numbers, detached, to be reported; by the names of the parameters that they move."""
        return {name: p.detach() for name, p in self.named_parameters()}

    @abstractmethod
    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        """One step, of number 0 at first: the moved parameters, and the state after the step.

        Parameters and gradients are stacked, `[tasks, *shape]` each; the state is from `init` or the step before.
        """


def zeros(params: Params) -> Params:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def at_least(field: str, value: N, least: N) -> N:
    if not value >= least:
        raise InvalidValue(field, value, f"must be at least {least}")
    return value


def positive(field: str, value: float) -> float:
    if not value > 0:
        raise InvalidValue(field, value, "must be above 0")
    return value


def fraction(field: str, value: float) -> float:
    if not 0 <= value < 1:
        raise InvalidValue(field, value, "must be at least 0 and below 1")
    return value
