"""Gradient descent, with and without momentum."""

from __future__ import annotations

from typing import Any

import torch

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, fraction, positive, zeros

__all__ = ["SGD", "Momentum"]


class SGD(InnerUpdate):
    """Plain gradient descent with an inner rate: `p - lr * g`."""

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__()
        self.lr = positive("lr", lr)

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        # `torch.sub` has a derivative of two operations, and of one pass more over what is stacked.
        return {name: torch.add(p, grads[name], alpha=-self.lr) for name, p in params.items()}, state


class Momentum(InnerUpdate):
    """Gradient descent with momentum: `v = momentum * v + g`, then `p - lr * v`, as `torch.optim.SGD`.

    Args:
        momentum: the share of the last velocity that is kept, in [0, 1).
    """

    def __init__(self, params: Params, lr: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.lr, self.momentum = positive("lr", lr), fraction("momentum", momentum)

    def init(self, params: Params) -> Params:
        return zeros(params)

    def forward(self, params: Params, grads: Params, state: Params, step: int) -> tuple[Params, Params]:
        velocity = {name: self.momentum * state[name] + grads[name] for name in params}
        return {name: torch.add(p, velocity[name], alpha=-self.lr) for name, p in params.items()}, {**state, **velocity}
