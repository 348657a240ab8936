"""Products of two tensors whose gradients are products of their own, for compiled steps.

Autograd's own gradients of a product leave transposes that a compiler copies: text steps were 5 % slower with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

__all__ = ["Bilinear", "product"]


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b'`, of matrices `[..., m, k]` and `[..., n, k]`; the gradient by `b` lies in memory as `b` does."""
    return Bilinear.apply(None, a, b, missing, b.stride(-2) < b.stride(-1))


def missing(y: Tensor | None, a: Any, b: Any, turned: bool) -> Tensor:
    """Of results `[..., m, n]` and both factors, the one that is None; `turned`: whether `b` lies transposed."""
    if y is None:
        return a @ b.mT
    if a is None:
        return y @ b
    return (a.mT @ y).mT if turned else y.mT @ a


class Bilinear(Function):
    """Of a result and two factors, the one that is None, as `rule(y, a, b, *settings)` finds it.

    The result is linear in both factors, and so are the gradients by them in their two arguments. The derivatives of
    each are the other two, so all orders of derivatives are exact.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor | None, a: Any, b: Any, rule: Callable[..., Tensor], *settings: Any) -> Tensor:
        return rule(y, a, b, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.others = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        all_three = [grad if tensor is None else tensor for tensor in ctx.saved_tensors]
        found = [
            Bilinear.apply(*all_three[:asked], None, *all_three[asked + 1 :], *ctx.others) if needed else None
            for asked, needed in enumerate(ctx.needs_input_grad[:3])
        ]
        return *found, *(None for _ in ctx.others)
