"""What transformers compute: functions whose second derivatives are written out, and tables of positions."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["across", "along", "causal", "gelu", "least", "rotations", "to_unit_mean_square", "turned"]

# Tables that depend on positions alone. Compilers do not look into them: they would compute a power, a cosine and a
# sine anew for every number that is turned.


@functools.lru_cache(maxsize=64)
def table_of_rotations(count: int, width: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    rates = base ** -(torch.arange(0, width, 2, device=device, dtype=dtype) / width)
    turns = torch.arange(count, device=device).unsqueeze(-1) * rates
    return torch.stack([turns.cos(), turns.sin()])


@functools.lru_cache(maxsize=64)
def table_of_what_is_hidden(length: int, read: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    hidden = torch.ones(length, read, dtype=torch.bool, device=device).triu(read - length + 1)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, least(dtype))


def least(dtype: torch.dtype) -> float:
    """What is added to a product that must not count; twice over it is still a number, as is its softmax."""
    return torch.finfo(dtype).min / 2


@torch.library.custom_op(
    "mlframework::rotations", mutates_args=(), schema="(Tensor like, int count, int width, float base) -> Tensor"
)
def rotation_table(like: Tensor, count: int, width: int, base: float) -> Tensor:
    return table_of_rotations(count, width, base, like.dtype, like.device).clone()


@torch.library.custom_op("mlframework::causal", mutates_args=(), schema="(Tensor like, int length, int read) -> Tensor")
def causal_table(like: Tensor, length: int, read: int) -> Tensor:
    return table_of_what_is_hidden(length, read, like.dtype, like.device).clone()


rotation_table.register_fake(lambda like, count, width, base: like.new_empty(2, count, width // 2))
causal_table.register_fake(lambda like, length, read: like.new_empty(length, read))


def rotations(x: Tensor, count: int, base: float) -> tuple[Tensor, Tensor]:
    """By what rotary attention turns vectors like `x` `[..., d]` at each position: cosines and sines, `[count, d / 2]`.

    Args:
        x: of the type and width that is asked for.
        count: positions.
        base: the longest wave, in positions, divided by 2 pi.
    """
    return rotation_table(like(x), count, x.shape[-1], base).unbind()


def causal(x: Tensor, length: int, read: int) -> Tensor:
    """What is added to products of the last `length` queries with `read` keys so that none reads what comes later."""
    return causal_table(like(x), length, read)


def like(x: Tensor) -> Tensor:
    """Tells a type and a device, and belongs to no task and no graph."""
    return torch.zeros((), dtype=x.dtype, device=x.device)


# Functions with written derivatives. Each gradient is a function of its own, whose gradients are written in operations
# that autograd knows: they can be differentiated to any order, and the first two cost least.


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
        by_b = Down.apply(a, grad).mT if lies_transposed else Down.apply(grad, a)
        return by_a, by_b


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


class Turned(Function):
    """Pairs of numbers, the halves of vectors `[..., d]`, as vectors in the plane, turned by their angles."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return Turned.apply(grad, cosine, -sine), None, None


class Gelu(Function):
    """`x` times the share of a normal distribution that is below it."""

    generate_vmap_rule = True
    setup_context = staticmethod(keep)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return GeluBackward.apply(grad, x)


class GeluBackward(Function):
    """The gradient by `x` of that by `gelu(x)`."""

    generate_vmap_rule = True
    setup_context = staticmethod(keep)

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        square = x.square()
        bend = torch.exp(square * -0.5) * (2 - square) * (1 / math.sqrt(2 * math.pi))
        return GeluBackward.apply(cotangent, x), cotangent * grad * bend


class ToUnit(Function):
    """Vectors divided by the root of their mean square, to which `eps` is added."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> Tensor:
        return x * inverse_root(x, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.eps = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ToUnitBackward.apply(grad, x, ctx.eps), None


class ToUnitBackward(Function):
    """The gradient by `x` of that by its unit vectors n: `r (g - n <g n>)`, with <> for the mean over a vector."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
        r = inverse_root(x, eps)
        n = x * r
        return r * (grad - n * mean(grad * n))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, ctx.eps = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
        grad, x = ctx.saved_tensors
        r = inverse_root(x, ctx.eps)
        n = x * r
        on_grad, on_cotangent, both = mean(grad * n), mean(cotangent * n), mean(grad * cotangent)
        by_grad = r * (cotangent - n * on_cotangent)
        by_x = r.square() * (n * (3 * on_grad * on_cotangent - both) - cotangent * on_grad - grad * on_cotangent)
        return by_grad, by_x, None


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """One over the root of the mean square of vectors `[..., d]`: `[..., 1]`."""
    return torch.rsqrt(mean(x.square()) + eps)


def across(a: Tensor, b: Tensor) -> Tensor:
    """Products of all rows of `a` `[..., m, k]` with all rows of `b` `[..., n, k]`: `[..., m, n]`."""
    return Across.apply(a, b)


def along(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices `[..., m, k]` and `[..., k, n]`."""
    return Along.apply(a, b)


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each pair of numbers of `x` `[..., d]`, one of each half, as a vector in the plane, turned by its angle.

    Args:
        x: vectors.
        cosine, sine: of the angles, `[..., d / 2]`; they are constants.
    """
    return Turned.apply(x, cosine, sine)


def gelu(x: Tensor) -> Tensor:
    """`x` times the share of a normal distribution that is below it."""
    return Gelu.apply(x)


def to_unit_mean_square(x: Tensor, eps: float) -> Tensor:
    """Vectors `[..., d]` divided by the root of their mean square, to which `eps` is added."""
    return ToUnit.apply(x, eps)
