"""Rates that the outer loop learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, at_least, positive

__all__ = ["LayerStepRates", "LearnedRates"]


class LearnedRates(InnerUpdate):
    """Gradient descent with one learned rate for every single parameter: `p - alpha * g`.

    All rates start as `lr`.

    Reference: Li, Zhou, Chen, Li, Meta-SGD, 2017, arXiv:1707.09835, equation 2. Deviation: rates start from one value,
        not from draws.
    """

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__()
        self.names = tuple(params)
        self.rates = nn.ParameterList(torch.full_like(p, positive("lr", lr)) for p in params.values())

    def learned(self) -> dict[str, Tensor]:
        """The rates by parameter: one for each entry."""
        return {name: rates.detach() for name, rates in zip(self.names, self.rates, strict=True)}

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        rates = dict(zip(self.names, self.rates, strict=True))
        return {name: p - rates[name] * grads[name] for name, p in params.items()}, state


class LayerStepRates(InnerUpdate):
    """Gradient descent with a learned rate for every parameter tensor and inner step: `p - alpha[step] * g`.

    Args:
        lr: every rate's initial value.
        steps: how many steps have rates of their own; later steps take those of the last one.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019, arXiv:1810.09502, section 4 (learning per-layer
        per-step learning rates). As in the official code, weight and bias of a layer have rates of their own.
    """

    def __init__(self, params: Params, lr: float, steps: int) -> None:
        super().__init__()
        self.names, self.steps = tuple(params), at_least("steps", steps, 1)
        self.rates = nn.Parameter(torch.full((len(params), steps), positive("lr", lr)))

    def learned(self) -> dict[str, Tensor]:
        """The rates by parameter: one for each inner step `[steps]`."""
        return {name: rates.detach() for name, rates in zip(self.names, self.rates, strict=True)}

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        rates = dict(zip(self.names, self.rates[:, min(step, self.steps - 1)], strict=True))
        return {name: p - rates[name] * grads[name] for name, p in params.items()}, state
