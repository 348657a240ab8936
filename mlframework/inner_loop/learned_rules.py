"""Rules that the outer loop learns: rates, maps of the gradient, and a small network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, at_least, fraction, positive, zeros

__all__ = ["LayerStepRates", "LearnedRates", "LearnedUpdate", "MetaCurvature", "preprocessed"]


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

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        rates = dict(zip(self.names, self.rates[:, min(step, self.steps - 1)], strict=True))
        return {name: p - rates[name] * grads[name] for name, p in params.items()}, state


class MetaCurvature(InnerUpdate):
    """Gradient descent with a learned linear map of each parameter's gradient, one matrix per axis: `p - lr * MC(g)`.

    A linear layer's gradient is multiplied by matrices over its outputs and its inputs (`M_o g M_i^T`), a
    convolution's also by one over the positions of its kernel, taken together (`M_f`). They start as identities, which
    is SGD.

    Args:
        params: a matrix over an axis of length n has n^2 entries to learn.
        lr: the inner rate, fixed.

    Reference: Park, Oliva, Meta-Curvature, 2019, arXiv:1902.03356, section 3. Parameters of a single axis, such
        as biases and weights of norms, have a learned factor for each entry's gradient, in place of a whole matrix.
    """

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__()
        self.lr = positive("lr", lr)
        self.axes = {name: len(identities(p)) for name, p in params.items()}
        self.matrices = nn.ParameterList(matrix for p in params.values() for matrix in identities(p))

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        matrices = iter(self.matrices)
        of = {name: list(islice(matrices, count)) for name, count in self.axes.items()}
        mapped = {name: transformed(grad, of[name]) for name, grad in grads.items()}
        return {name: p - self.lr * mapped[name] for name, p in params.items()}, state


def identities(param: Tensor) -> list[Tensor]:
    """Matrices for outputs, inputs and, of a kernel, its positions; a factor for each entry of a vector."""
    if param.dim() < 2:
        return [torch.ones_like(param)]
    sizes = param.shape if param.dim() < 4 else (*param.shape[:2], param[0, 0].numel())
    return [torch.eye(size, dtype=param.dtype, device=param.device) for size in sizes]


def transformed(grad: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The products of a stacked gradient `[tasks, out, in, ...]` with a matrix along each axis after the first."""
    if grad.dim() < 3:
        return grad * matrices[0]
    result = grad.flatten(3) if grad.dim() > 4 else grad
    for axis, matrix in enumerate(matrices, start=1):
        result = (result.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
    return result.reshape(grad.shape)


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
        """The step's direction, of the shape of `grad` and `mean`."""
        a, b = self.network(torch.stack([*preprocessed(grad), *preprocessed(mean)], dim=-1)).unbind(-1)
        return (1 + a) * grad + b * mean


def preprocessed(grad: Tensor, limit: float = 10.0) -> tuple[Tensor, Tensor]:
    """Magnitude and direction of a gradient, on scales that a network can read.

    `(log|g| / limit, sign(g))` where `|g| >= exp(-limit)`, and `(-1, exp(limit) * g)` below (arXiv:1606.04474, appendix
    A). Both are continuous, and written so that a gradient of zero has a finite derivative.
    """
    magnitude = grad.abs().clamp(min=math.exp(-limit)).log() / limit
    return magnitude, (grad * math.exp(limit)).clamp(-1, 1)
