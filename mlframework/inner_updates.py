"""Inner update rules: how parameters move, given the gradient of the support loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.errors import InvalidValue
from mlframework.inner_loop import Params

__all__ = ["SGD", "Adam", "InnerUpdate", "LayerStepRates", "LearnedRates", "Momentum"]


class InnerUpdate(nn.Module, ABC):
    """A differentiable update rule. Whatever it learns (rates, say) are its own parameters, and meta-parameters.

    Its constructor's first argument is the dictionary of parameters it will move, of one task, as in `torch.optim`.
    """

    def init(self, params: Params) -> Any:
        """The state before the first step: nothing, unless a rule remembers something."""
        return ()

    @abstractmethod
    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        """One step.

        Args:
            params: stacked, `[tasks, *shape]` each.
            grads: same names and shapes.
            state: what `init` or the step before returned.
            step: 0 at the first step.

        Returns:
            The moved parameters, and the state after the step.
        """


def positive(field: str, value: float) -> float:
    """`value`, if it is above 0."""
    if not value > 0:
        raise InvalidValue(field, value, "must be above 0")
    return value


def fraction(field: str, value: float) -> float:
    """`value`, if it is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise InvalidValue(field, value, "must be at least 0 and below 1")
    return value


class SGD(InnerUpdate):
    """Plain gradient descent: `p - lr * g`.

    Args:
        params: the parameters to move, by name.
        lr: the inner rate.
    """

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__()
        self.lr = positive("lr", lr)

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        return {name: p - self.lr * grads[name] for name, p in params.items()}, state


class Momentum(InnerUpdate):
    """Gradient descent with momentum: `v = momentum * v + g`, then `p - lr * v`, as `torch.optim.SGD`.

    Args:
        params: the parameters to move, by name.
        lr: the inner rate.
        momentum: the share of the last velocity that is kept, in [0, 1).
    """

    def __init__(self, params: Params, lr: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.lr, self.momentum = positive("lr", lr), fraction("momentum", momentum)

    def init(self, params: Params) -> Params:
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def forward(self, params: Params, grads: Params, state: Params, step: int) -> tuple[Params, Params]:
        velocity = {name: self.momentum * state[name] + grads[name] for name in params}
        return {name: p - self.lr * velocity[name] for name, p in params.items()}, {**state, **velocity}


class Adam(InnerUpdate):
    """Adam with its bias corrections.

    Args:
        params: the parameters to move, by name.
        lr: the inner rate.
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
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return zeros, dict(zeros)

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        mean = {name: self.beta1 * state[0][name] + (1 - self.beta1) * grads[name] for name in params}
        square = {name: self.beta2 * state[1][name] + (1 - self.beta2) * grads[name].square() for name in params}

        def moved(name: str, p: Tensor) -> Tensor:
            corrected = mean[name] / (1 - self.beta1 ** (step + 1))
            spread = torch.sqrt(square[name] / (1 - self.beta2 ** (step + 1)) + self.eps**2)
            return p - self.lr * corrected / spread

        return {name: moved(name, p) for name, p in params.items()}, ({**state[0], **mean}, {**state[1], **square})


class LearnedRates(InnerUpdate):
    """Gradient descent with one learned rate for every single parameter: `p - alpha * g`.

    Args:
        params: the parameters to move, by name.
        lr: every rate's initial value.

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
        params: the parameters to move, by name.
        lr: every rate's initial value.
        steps: how many steps have rates of their own; later steps take those of the last one.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019, arXiv:1810.09502, section 4 (learning per-layer
        per-step learning rates). As in the official code, weight and bias of a layer have rates of their own.
    """

    def __init__(self, params: Params, lr: float, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise InvalidValue("steps", steps, "must be at least 1")
        self.names, self.steps = tuple(params), steps
        self.rates = nn.Parameter(torch.full((len(params), steps), positive("lr", lr)))

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        rates = dict(zip(self.names, self.rates[:, min(step, self.steps - 1)], strict=True))
        return {name: p - rates[name] * grads[name] for name, p in params.items()}, state
