"""Batch normalisation of stacked tasks, with both derivatives in closed form.

Eagerly, value and gradient are torch's own kernels, to which tasks times channels are channels. A compiler gets
formulas instead, which it fuses with their neighbours. The second derivative is a formula in both cases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mlframework.backend.private import gradient_is_batched
from mlframework.backend.tracing import is_traced

__all__ = ["normalise"]

Triple = tuple[Tensor, Tensor, Tensor]


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each task's images, normalised by mean and variance over its own images and positions, scaled and shifted.

    Args:
        x: `[tasks, n, channels, *positions]`.
        weight, bias: `[tasks, channels]`.
        eps: added to the variance.
    """
    x = x.to(weight.dtype)  # a variance in bfloat16 is of two digits
    rows = x.flatten(3).movedim(2, -1) if x.dim() > 3 else x.unsqueeze(2)
    y = Normalise.apply(rows, weight, bias, eps, is_traced())[0]
    return y.movedim(-1, 2).view(x.shape)


class Normalise(Function):
    """Rows `[tasks, n, positions, channels]`, normalised, with mean and inverse standard deviation `[tasks, channels]`.

    The latter two have no gradient of their own: derivatives regard them as the functions of the rows that they are.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, traced: bool) -> Triple:
        if traced:
            mean, inverse = moments(x, eps)
            return (x - each(mean)) * each(weight * inverse) + each(bias), mean, inverse
        scale, shift = both(weight, bias)
        y, *numbers = torch.native_batch_norm(joined(x), scale, shift, None, None, True, 0.0, eps)
        mean, inverse = (number.view(weight.shape) for number in numbers)
        return parted(y, x), mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
        x, weight, _, ctx.eps, ctx.traced = inputs
        ctx.save_for_backward(x, weight, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        inputs = (grad, *ctx.saved_tensors, ctx.eps, ctx.traced)
        if gradient_is_batched(grad):  # by operations that autograd knows: functions lose derivatives of such
            x, weight, *_ = ctx.saved_tensors
            return *gradients(grad, x, weight, *moments(x, ctx.eps)), None, None
        # Without a second derivative to take there is nothing to keep for it.
        found = NormaliseBackward.apply(*inputs) if torch.is_grad_enabled() else NormaliseBackward.forward(*inputs)
        return *found, None, None


class NormaliseBackward(Function):
    """Gradients by rows, weight and bias, of that by the normalised rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float, traced: bool
    ) -> Triple:
        if traced:
            return gradients(grad, x, weight, mean, inverse)
        scale, mu, r = both(weight, mean, inverse)
        by_x, *numbers = torch.ops.aten.native_batch_norm_backward(
            joined(grad), joined(x), scale, None, None, mu, r, True, eps, [True, True, True]
        )
        by_weight, by_bias = (number.view(weight.shape) for number in numbers)
        return parted(by_x, x), by_weight, by_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
        *tensors, ctx.eps, _ = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, v: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the first three inputs, of those by the three results.

        With <> for the average over a channel's pixels, x' for the normalised rows and n for the number of pixels, the
        results are `weight * inverse * (g - <g> - x' <g x'>)`, `n <g x'>` and `n <g>`.
        """
        grad, x, weight, mean, inverse, by_weight, by_bias = ctx.saved_tensors
        n = pixels(x)
        if torch.is_grad_enabled():  # for a third derivative all of them are functions of rows
            mean, inverse = moments(x, ctx.eps)
            by_weight, by_bias = total(grad * (x - each(mean)) * each(inverse)), total(grad)
        centred, g = x - each(mean), grad - each(by_bias / n)
        average, gx = total(v) / n, by_weight / n
        vx, gv = total(v * centred) * inverse / n, total(v * g) / n
        slope = weight * inverse
        shared = (p - slope * vx) * inverse  # of x in the one gradient, of g in the other
        by_grad = v * each(slope) + centred * each(shared) + each(q - slope * average)
        on_v = -slope * inverse * gx
        on_x = (slope * (3 * gx * vx - gv) - p * gx) * inverse.square()
        by_x = centred * each(on_x) + g * each(shared) + (v - each(average)) * each(on_v)
        return by_grad, by_x, n * inverse * (gv - gx * vx), None, None, None, None


def gradients(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor) -> Triple:
    """The formulas of `NormaliseBackward`."""
    n, normalised = pixels(x), (x - each(mean)) * each(inverse)
    by_weight, by_bias = total(grad * normalised), total(grad)
    by_x = each(weight * inverse) * (grad - each(by_bias / n) - normalised * each(by_weight / n))
    return by_x, by_weight, by_bias


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation over a channel's pixels, `[tasks, channels]`."""
    mean = total(x) / pixels(x)
    return mean, torch.rsqrt(total((x - each(mean)).square()) / pixels(x) + eps)


def pixels(x: Tensor) -> int:
    """How many pixels each channel of a task has."""
    return x.shape[1] * x.shape[2]


def each(numbers: Tensor) -> Tensor:
    """Numbers `[tasks, channels]` for all rows."""
    return numbers[:, None, None, :]


def total(rows: Tensor) -> Tensor:
    """The sum over images and positions: image by image, since all of them are more than a cache holds."""
    return rows.sum(-2).sum(-2)


def joined(rows: Tensor) -> Tensor:
    """Rows as torch's kernels take them, `[n, tasks * channels, positions, 1]`."""
    # A view where tasks lie inside of images, as `convolve` leaves them.
    return rows.permute(1, 0, 3, 2).flatten(1, 2).unsqueeze(-1).contiguous()


def parted(images: Tensor, like: Tensor) -> Tensor:
    """What `joined` undoes."""
    return images.view(images.shape[0], like.shape[0], like.shape[3], -1).permute(1, 0, 3, 2)


def both(*numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers `[tasks, channels]` as `[tasks * channels]`."""
    return tuple(number.flatten() for number in numbers)
