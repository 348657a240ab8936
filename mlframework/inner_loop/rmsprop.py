"""RMSprop."""

from __future__ import annotations

import torch

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, fraction, positive, zeros

__all__ = ["RMSprop"]


class RMSprop(InnerUpdate):
    """Gradient steps over the root of a running mean of squared gradients, `s`: `p - lr * g / sqrt(s + eps^2)`.

    Args:
        decay: the share of the last mean that is kept, in [0, 1).
        eps: keeps the denominator from zero.

    Reference: Tieleman, Hinton, Lecture 6.5: RMSprop, COURSERA, 2012; `torch.optim.RMSprop`. Deviation: the denominator
        is not `sqrt(s) + eps`, whose derivative is infinite where a gradient is zero.
    """

    def __init__(self, params: Params, lr: float, decay: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__()
        self.lr, self.decay, self.eps = positive("lr", lr), fraction("decay", decay), positive("eps", eps)

    def init(self, params: Params) -> Params:
        return zeros(params)

    def forward(self, params: Params, grads: Params, state: Params, step: int) -> tuple[Params, Params]:
        square = {name: self.decay * state[name] + (1 - self.decay) * grads[name].square() for name in params}
        roots = {name: torch.rsqrt(square[name] + self.eps**2) for name in params}
        return {name: p - self.lr * grads[name] * roots[name] for name, p in params.items()}, {**state, **square}
