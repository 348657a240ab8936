"""A network that computes the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, at_least, fraction, positive, zeros

__all__ = ["LearnedUpdate", "preprocessed"]


class LearnedUpdate(InnerUpdate):
    """A network reads each coordinate's gradient `g` and its running mean `m`, and scales the step along each.

    The step is `p - lr * ((1 + a) * g + b * m)`, where `a` and `b` are the network's two outputs for that coordinate;
    one network serves all coordinates. Its last layer starts near zero, so that the first meta-gradients are those of
    SGD. As steps are multiples of `g` and `m`, the steep preprocessing of small gradients does not make them unstable.

    Args:
        hidden: width of the network's one hidden layer, which is kept for every coordinate, step and task.
        memory: the share of the last running mean that is kept, in [0, 1).

    Reference: Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016, arXiv:1606.04474,
        section 2.1 (coordinatewise network) and appendix A (preprocessing). Deviations: a running mean stands in for
        the LSTM's memory; the network scales gradients and does not emit steps; gradients are not treated as constants.
    """

    def __init__(self, params: Params, lr: float, hidden: int = 8, memory: float = 0.9) -> None:
        super().__init__()
        at_least("hidden", hidden, 1)
        self.lr, self.memory = positive("lr", lr), fraction("memory", memory)
        self.network = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        with torch.no_grad():
            for p in self.network[-1].parameters():
                p.mul_(0.01)

    def init(self, params: Params) -> Params:
        return zeros(params)

    def forward(self, params: Params, grads: Params, state: Params, step: int) -> tuple[Params, Params]:
        means = {name: self.memory * state[name] + (1 - self.memory) * grads[name] for name in params}
        moved = {name: p - self.lr * self.direction(grads[name], means[name]) for name, p in params.items()}
        return moved, {**state, **means}

    def direction(self, grad: Tensor, mean: Tensor) -> Tensor:
        a, b = self.network(torch.stack([*preprocessed(grad), *preprocessed(mean)], dim=-1)).unbind(-1)
        return (1 + a) * grad + b * mean


def preprocessed(grad: Tensor, limit: float = 10.0) -> tuple[Tensor, Tensor]:
    """Magnitude and direction of a gradient, on scales that a network can read.

    `(log|g| / limit, sign(g))` where `|g| >= exp(-limit)`, and `(-1, exp(limit) * g)` below (arXiv:1606.04474, appendix
    A). Both are continuous, and written so that a gradient of zero has a finite derivative.
    """
    magnitude = grad.abs().clamp(min=math.exp(-limit)).log() / limit
    return magnitude, (grad * math.exp(limit)).clamp(-1, 1)
