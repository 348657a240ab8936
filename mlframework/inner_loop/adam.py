"""Adam."""

from __future__ import annotations

from typing import Any

import torch

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, fraction, positive, zeros

__all__ = ["Adam"]


class Adam(InnerUpdate):
    """Adam with its bias corrections.

    Args:
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        eps: keeps the denominator from zero.

    Reference: Kingma, Ba, Adam, 2015, arXiv:1412.6980, algorithm 1. Deviation: the denominator is `sqrt(v + eps^2)`,
        not `sqrt(v) + eps`, whose derivative is infinite where a gradient is zero.
    """

    def __init__(self, params: Params, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.lr, self.eps = positive("lr", lr), positive("eps", eps)
        self.beta1, self.beta2 = fraction("beta1", beta1), fraction("beta2", beta2)

    def init(self, params: Params) -> tuple[Params, Params]:
        return zeros(params), zeros(params)

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        mean = {name: self.beta1 * state[0][name] + (1 - self.beta1) * grads[name] for name in params}
        square = {name: self.beta2 * state[1][name] + (1 - self.beta2) * grads[name].square() for name in params}
        means = {name: mean[name] / (1 - self.beta1 ** (step + 1)) for name in params}
        roots = {name: torch.sqrt(square[name] / (1 - self.beta2 ** (step + 1)) + self.eps**2) for name in params}
        moved = {name: p - self.lr * means[name] / roots[name] for name, p in params.items()}
        return moved, ({**state[0], **mean}, {**state[1], **square})
