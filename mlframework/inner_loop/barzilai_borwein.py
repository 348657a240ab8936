"""Gradient steps whose rate follows from the last two gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, positive
from mlframework.solvers.conjugate_gradient import inner_product

__all__ = ["BarzilaiBorwein"]


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
        """The next rates `[tasks]`."""
        step = {name: p - last_params[name] for name, p in params.items()}
        change = {name: g - last_grads[name] for name, g in grads.items()}
        curvature, square = inner_product(step, change), inner_product(change, change)
        # Below the smallest normal number a square may be 0 though the change is not.
        convex = (curvature > 0) & (square >= torch.finfo(square.dtype).tiny)
        return torch.where(convex, curvature / torch.where(convex, square, 1.0), last)
