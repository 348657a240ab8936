"""Update rules that have nothing to learn: those of torch's optimizers, differentiable, and two for inner problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, fraction, positive, zeros
from mlframework.solvers.conjugate_gradient import inner_product

__all__ = ["SGD", "Adam", "BarzilaiBorwein", "Momentum", "Proximal", "RMSprop"]


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

        def moved(name: str, p: Tensor) -> Tensor:
            corrected = mean[name] / (1 - self.beta1 ** (step + 1))
            spread = torch.sqrt(square[name] / (1 - self.beta2 ** (step + 1)) + self.eps**2)
            return p - self.lr * corrected / spread

        return {name: moved(name, p) for name, p in params.items()}, ({**state[0], **mean}, {**state[1], **square})


class BarzilaiBorwein(InnerUpdate):
    """Gradient steps of the rate that the curvature along each task's last step asks for: no rate to tune.

    The rate is `<dp, dg> / <dg, dg>`, with dp and dg the last changes of parameters and gradient; where they tell of no
    positive curvature it stays as it was.

    Args:
        lr: the rate of the first step; one that is too large is put right by the next.

    Reference: Barzilai, Borwein, Two-Point Step Size Gradient Methods, 1988, IMA J. Numerical Analysis 8, equation 6.
    """

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__()
        self.lr = positive("lr", lr)

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        rates = self.rates(params, grads, *state) if state else torch.full_like(inner_product(grads, grads), self.lr)
        moved = {name: p - rates.view(-1, *(1 for _ in p.shape[1:])) * grads[name] for name, p in params.items()}
        return moved, (params, grads, rates)

    def rates(self, params: Params, grads: Params, last_params: Params, last_grads: Params, last: Tensor) -> Tensor:
        """`[tasks]`."""
        step = {name: p - last_params[name] for name, p in params.items()}
        change = {name: g - last_grads[name] for name, g in grads.items()}
        curvature, square = inner_product(step, change), inner_product(change, change)
        # Below the smallest normal number a square may be 0 though the change is not.
        convex = (curvature > 0) & (square >= torch.finfo(square.dtype).tiny)
        return torch.where(convex, curvature / torch.where(convex, square, 1.0), last)


class Proximal(InnerUpdate):
    """Another rule, on the support loss plus `strength / 2 * |phi - theta|^2`, theta being where the inner loop starts.

    Args:
        rule: builds the other rule from them, as in `functools.partial(SGD, lr=0.1)`.
        strength: lambda; the inner problem converges if it is above the most negative curvature of the support loss.

    Reference: Rajeswaran et al., Meta-Learning with Implicit Gradients, 2019, arXiv:1909.04630, equation 3.
    """

    def __init__(self, params: Params, rule: Callable[[Params], InnerUpdate], strength: float) -> None:
        super().__init__()
        self.rule, self.strength = rule(params), positive("strength", strength)

    def init(self, params: Params) -> tuple[Params, Any]:
        return params, self.rule.init(params)

    def forward(self, params: Params, grads: Params, state: tuple[Params, Any], step: int) -> tuple[Params, Any]:
        start, inner = state
        pulled = {name: grads[name] + self.strength * (p - start[name]) for name, p in params.items()}
        moved, inner = self.rule(params, pulled, inner, step)
        return moved, (start, inner)
