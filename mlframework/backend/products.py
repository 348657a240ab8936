"""Products of matrices whose gradients are products of their own, for compiled steps.

Autograd's own gradients of a product leave transposes that a compiler copies: text steps were 5 % slower with them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

__all__ = ["product"]


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b'`, of matrices `[..., m, k]` and `[..., n, k]`; the gradient by `b` lies in memory as `b` does."""
    return Product.apply(None, a, b, b.stride(-2) < b.stride(-1))


class Product(Function):
    """Of results `[..., m, n]` and both factors, the one that is None; `turned`: whether `b` lies transposed.

    A product and its gradients by both factors are linear in two of the three. The derivatives of each are the other
    two, so all orders of derivatives are exact.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor | None, a: Any, b: Any, turned: bool) -> Tensor:
        if y is None:
            return a @ b.mT
        if a is None:
            return y @ b
        return (a.mT @ y).mT if turned else y.mT @ a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.turned = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        all_three = [grad if tensor is None else tensor for tensor in ctx.saved_tensors]
        found = [
            Product.apply(*all_three[:asked], None, *all_three[asked + 1 :], ctx.turned) if needed else None
            for asked, needed in enumerate(ctx.needs_input_grad[:3])
        ]
        return *found, None
