"""Any rule, on the support loss plus a pull towards the start of the inner loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, positive

__all__ = ["Proximal"]


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

    def learned(self) -> dict[str, Tensor]:
        return self.rule.learned()

    def forward(self, params: Params, grads: Params, state: tuple[Params, Any], step: int) -> tuple[Params, Any]:
        start, inner = state
        pulled = {name: grads[name] + self.strength * (p - start[name]) for name, p in params.items()}
        moved, inner = self.rule(params, pulled, inner, step)
        return moved, (start, inner)
