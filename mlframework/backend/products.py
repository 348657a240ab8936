"""Products of matrices whose gradients are products of their own, for compiled steps.

Autograd's own gradients of a product leave transposes that a compiler copies: text steps were 5 % slower with them.
Each function's derivatives are the others, so all orders of derivatives are exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

__all__ = ["Across"]


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps the arguments for the backward pass."""
    ctx.save_for_backward(*inputs)


class Across(Function):
    """`a b'`, of matrices `[..., m, k]` and `[..., n, k]`; the gradient by `b` lies in memory as `b` does."""

    generate_vmap_rule = True
    setup_context = staticmethod(keep)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        a, b = ctx.saved_tensors
        by_a = Along.apply(grad, b) if ctx.needs_input_grad[0] else None
        lies_transposed = b.stride(-2) < b.stride(-1)
        return by_a, Down.apply(a, grad).mT if lies_transposed else Down.apply(grad, a)


class Along(Function):
    """`a b`, of matrices `[..., m, k]` and `[..., k, n]`."""

    generate_vmap_rule = True
    setup_context = staticmethod(keep)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return Across.apply(grad, b), Down.apply(a, grad)


class Down(Function):
    """`a' b`, of matrices `[..., k, m]` and `[..., k, n]`."""

    generate_vmap_rule = True
    setup_context = staticmethod(keep)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a.mT @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return Across.apply(b, grad), Along.apply(a, grad)
