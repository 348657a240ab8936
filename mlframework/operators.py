"""Operators of convolution and normalisation, differentiable to any order, and batched over tasks by `vmap`.

Compilers do not look into them, which is what makes them fast: what is fused with a gather is computed as often as the
gather reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Pair", "convolve", "normalise", "patches", "sizes"]

LIBRARY = torch.library.Library("mlframework", "DEF")

#: Numbers for height and width.
Pair = Sequence[int]


def sizes(image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple[int, ...]:
    """Height and width of what a convolution makes of an image."""
    return tuple((i + 2 * p - k) // s + 1 for i, k, s, p in zip(image, kernel, stride, padding, strict=True))


# Patches and their sum, the adjoint of each other: the derivative of either, to any order, is the other.


def gather_patches(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """`[n, height, width, channels]` to the patches that a kernel sees, `[n, positions, kernel * channels]`."""
    n, *image, channels = x.shape
    (height, width), (high, wide) = sizes(image, kernel, stride, padding), kernel
    if any(padding):
        (top, left), inside = padding, x
        x = x.new_zeros(n, image[0] + 2 * top, image[1] + 2 * left, channels)
        x[:, top : top + image[0], left : left + image[1]] = inside
    x = x.contiguous()
    per_image, per_row, per_pixel, _ = x.stride()
    # Pixels that stand side by side in memory are copied in one go.
    view = x.as_strided(
        (n, height, width, high, wide * channels), (per_image, stride[0] * per_row, stride[1] * per_pixel, per_row, 1)
    )
    return view.reshape(n, height * width, high * wide * channels)


def overlay(rows: Tensor, image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The sum of patches `[n, positions, kernel * channels]` where they lie in `[n, height, width, channels]`."""
    height, width = sizes(image, kernel, stride, padding)
    n, channels = len(rows), rows.shape[-1] // (kernel[0] * kernel[1])
    rows, x = rows.contiguous(), rows.new_zeros(n, *image, channels)
    row, per_image = kernel[0] * kernel[1] * channels, image[0] * image[1] * channels
    for tap, (high, wide) in enumerate((i, j) for i in range(kernel[0]) for j in range(kernel[1])):
        y, from_row, count = overlap(high, image[0], height, stride[0], padding[0])
        z, from_column, wide_count = overlap(wide, image[1], width, stride[1], padding[1])
        size = (n, count, wide_count, channels)
        # By strides rather than slices: there are many of these, and they are small.
        here = x.as_strided(
            size,
            (per_image, stride[0] * image[1] * channels, stride[1] * channels, 1),
            (y * image[1] + z) * channels,
        )
        there = rows.as_strided(
            size, (height * width * row, width * row, row, 1), (from_row * width + from_column) * row + tap * channels
        )
        here.add_(there)
    return x


def overlap(offset: int, size: int, positions: int, stride: int, padding: int) -> tuple[int, int, int]:
    """Along an axis, for a kernel's element: the first pixel it falls on, at which position, and on how many pixels."""
    first = max(0, -((offset - padding) // stride))  # the first position at which it is inside the image
    last = min(positions, (size - 1 + padding - offset) // stride + 1)
    return max(first * stride + offset - padding, 0), min(first, positions), max(last - first, 0)


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Tensor] | None = None) -> str:
    """Registers an operator that compilers do not look into; `fake` gives the shape of its result, for tracing."""
    name = f"mlframework::{LIBRARY.define(schema)}"
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(name, fake)
    return name


def fake_patches(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    height, width = sizes(x.shape[1:3], kernel, stride, padding)
    return x.new_empty(len(x), height * width, kernel[0] * kernel[1] * x.shape[-1])


def fake_overlay(rows: Tensor, image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    return rows.new_empty(len(rows), *image, rows.shape[-1] // (kernel[0] * kernel[1]))


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps an operator's arguments: tensors for the backward pass, and the numbers that follow."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.numbers = inputs[len(tensors) :]


def keep_shape(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.image, ctx.numbers = inputs[0].shape[1:3], inputs[-3:]


def over_rows(name: str) -> None:
    """Registers that an operator's rows are independent, so that tasks join them."""

    def joined(info: Any, in_dims: Sequence[int | None], x: Tensor, *numbers: Any) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0] or 0, 0)
        return getattr(torch.ops.mlframework, name.partition("::")[2])(x.flatten(0, 1), *numbers).unflatten(
            0, x.shape[:2]
        ), 0

    torch.library.register_vmap(name, joined)


PATCHES = define("patches(Tensor x, int[] kernel, int[] stride, int[] padding) -> Tensor", gather_patches, fake_patches)
OVERLAY = define(
    "overlay(Tensor rows, int[] image, int[] kernel, int[] stride, int[] padding) -> Tensor", overlay, fake_overlay
)
torch.library.register_autograd(
    PATCHES,
    lambda ctx, grad: (torch.ops.mlframework.overlay(grad, ctx.image, *ctx.numbers), None, None, None),
    setup_context=keep_shape,
)
torch.library.register_autograd(
    OVERLAY,
    lambda ctx, grad: (torch.ops.mlframework.patches(grad, *ctx.numbers), None, None, None, None),
    setup_context=keep_shape,
)
over_rows(PATCHES)
over_rows(OVERLAY)

# A convolution and its gradients by input and by weight. Each is linear in both arguments, and the derivatives of any
# are the other two.


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def run_convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`[n, channels, height, width]` to `[n, out, ...]`."""
    return channels_last(torch.conv2d(channels_last(x), channels_last(weight), None, list(stride), list(padding)))


def by_input(grad: Tensor, weight: Tensor, image: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient by the images, `[n, channels, *image]`, of that by the result `[n, out, ...]`."""
    x = grad.new_empty(len(grad), weight.shape[1], *image).to(memory_format=torch.channels_last)
    return channels_last(backward(grad, x, weight, stride, padding, 0))


def by_weight(grad: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient by the weight, `[out, channels, *kernel]`."""
    weight = grad.new_empty(grad.shape[1], x.shape[1], *kernel).to(memory_format=torch.channels_last)
    return channels_last(backward(grad, channels_last(x), weight, stride, padding, 1))


def backward(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, which: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        channels_last(grad),
        x,
        weight,
        None,
        list(stride),
        list(padding),
        [1, 1],
        False,
        [0, 0],
        1,
        [which == 0, which == 1, False],
    )[which]


def fake_convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    size = sizes(x.shape[2:], weight.shape[2:], stride, padding)
    return x.new_empty(len(x), len(weight), *size).to(memory_format=torch.channels_last)


def fake_by_input(grad: Tensor, weight: Tensor, image: Pair, stride: Pair, padding: Pair) -> Tensor:
    return grad.new_empty(len(grad), weight.shape[1], *image).to(memory_format=torch.channels_last)


def fake_by_weight(grad: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    return grad.new_empty(grad.shape[1], x.shape[1], *kernel).to(memory_format=torch.channels_last)


CONVOLVE = define(
    "convolve(Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor", run_convolve, fake_convolve
)
BY_INPUT = define(
    "by_input(Tensor grad, Tensor weight, int[] image, int[] stride, int[] padding) -> Tensor", by_input, fake_by_input
)
BY_WEIGHT = define(
    "by_weight(Tensor grad, Tensor x, int[] kernel, int[] stride, int[] padding) -> Tensor", by_weight, fake_by_weight
)


def convolve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), ops = ctx.saved_tensors, torch.ops.mlframework
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    return (
        ops.by_input(grad, weight, x.shape[2:], *ctx.numbers) if needs_x else None,
        ops.by_weight(grad, x, weight.shape[2:], *ctx.numbers) if needs_weight else None,
        None,
        None,
    )


def by_input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    (grad, weight), ops, numbers = ctx.saved_tensors, torch.ops.mlframework, ctx.numbers[1:]
    needs_grad, needs_weight = ctx.needs_input_grad[:2]
    return (
        ops.convolve(x, weight, *numbers) if needs_grad else None,
        ops.by_weight(grad, x, weight.shape[2:], *numbers) if needs_weight else None,
        None,
        None,
        None,
    )


def by_weight_backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    (grad, x), ops, numbers = ctx.saved_tensors, torch.ops.mlframework, ctx.numbers[1:]
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    return (
        ops.convolve(x, weight, *numbers) if needs_grad else None,
        ops.by_input(grad, weight, x.shape[2:], *numbers) if needs_x else None,
        None,
        None,
        None,
    )


def task_by_task(name: str, *, second: bool) -> None:
    """Registers how an operator runs over tasks.

    Args:
        name: of the operator.
        second: whether its second argument is per image, as the first is; else it is a weight, which all images share,
            so that where it is the same for all tasks, they are images like others.
    """
    operator = getattr(torch.ops.mlframework, name.partition("::")[2])

    def run(info: Any, in_dims: Sequence[int | None], a: Tensor, b: Tensor, *numbers: Any) -> tuple[Tensor, int]:
        a, b = (t if dim is None else t.movedim(dim, 0) for t, dim in zip((a, b), in_dims[:2], strict=True))
        if not second and in_dims[1] is None:
            return operator(a.flatten(0, 1), b, *numbers).unflatten(0, a.shape[:2]), 0
        tasks = zip(
            *(
                t.unbind() if dim is not None else [t] * info.batch_size
                for t, dim in ((a, in_dims[0]), (b, in_dims[1]))
            ),
            strict=True,
        )
        return stacked([operator(*task, *numbers) for task in tasks]), 0

    torch.library.register_vmap(name, run)


def stacked(parts: list[Tensor]) -> Tensor:
    """Tensors `[n, channels, height, width]` of tasks, `[tasks, ...]`, channels last in memory."""
    if len(parts) == 1:
        return parts[0].unsqueeze(0)
    return torch.stack([part.permute(0, 2, 3, 1) for part in parts]).permute(0, 1, 4, 2, 3)


torch.library.register_autograd(CONVOLVE, convolve_backward, setup_context=keep)
torch.library.register_autograd(BY_INPUT, by_input_backward, setup_context=keep)
torch.library.register_autograd(BY_WEIGHT, by_weight_backward, setup_context=keep)
task_by_task(CONVOLVE, second=False)
task_by_task(BY_INPUT, second=False)
task_by_task(BY_WEIGHT, second=True)

# Batch normalisation by torch's own kernels, for the CPU: images are `[..., n, channels, height, width]`, and numbers
# of each channel `[..., channels]`; axes in front are tasks. Mean and inverse standard deviation are handed from
# operator to operator to save time, but derivatives regard them as what they are, functions of the images.

FORWARD = torch.ops.aten.native_batch_norm.out
BACKWARD = torch.ops.aten.native_batch_norm_backward.default


def dense(x: Tensor, like: Tensor) -> Tensor:
    """Images in the memory format of others: contiguous, or else channels last."""
    return x.contiguous() if like.is_contiguous() else x.movedim(-3, -1).contiguous().movedim(-1, -3)


def by_task(images: Sequence[Tensor], numbers: Sequence[Tensor]) -> Any:
    """The images and numbers of one task after the other."""
    unbound = [x.view(-1, *x.shape[-4:]).unbind() for x in images]
    return zip(*unbound, *(x.reshape(-1, x.shape[-1]).unbind() for x in numbers), strict=True)


def run_normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images normalised by their own statistics, scaled and shifted; then the mean and inverse standard deviation."""
    x = dense(x, x)
    y, mean, inverse = torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    for one, out, scale, shift, mu, r in by_task([x, y], [weight, bias, mean, inverse]):
        FORWARD(one, scale, shift, None, None, True, 0.0, eps, out=out, save_mean=mu, save_invstd=r)
    return y, mean, inverse


def sums(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Over a channel's pixels, the sum of `grad` times `(x - mean) * inverse`, and that of `grad`."""
    x = dense(x, x)
    parts = [
        BACKWARD(g, one, None, None, None, mu, r, True, 0.0, [False, True, True])[1:]
        for g, one, mu, r in by_task([dense(grad, x), x], [mean, inverse])
    ]
    products, totals = (torch.stack(part).view(mean.shape) for part in zip(*parts, strict=True))
    return products, totals


def combined(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of images times numbers of their channels, and a constant of each channel."""
    (x, factor), *others = terms
    result = torch.addcmul(spread(constant), x, spread(factor))
    for x, factor in others:
        result.addcmul_(x, spread(factor))
    return result


def spread(numbers: Tensor) -> Tensor:
    return numbers[..., None, :, None, None]


def pixels(x: Tensor) -> int:
    """How many pixels each channel of a task has."""
    return x.shape[-4] * x.shape[-2] * x.shape[-1]


def run_normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by images, weight and bias, of that by the normalised images."""
    if x.dim() == 4:  # faster than what follows, unless its results would have to be stacked
        x = dense(x, x)
        return BACKWARD(dense(grad, x), x, weight, None, None, mean, inverse, True, eps, [True, True, True])
    by_weight, by_bias = sums(grad, x, mean, inverse)
    scale = weight * inverse
    by_centred = -scale * inverse * by_weight / pixels(x)
    by_x = combined(-scale * by_bias / pixels(x) - by_centred * mean, (grad, scale), (x, by_centred))
    return by_x, by_weight, by_bias


class Moments(NamedTuple):
    """What the second derivative needs of images x, a gradient g and its cotangent v: averages over a channel's pixels.

    Attributes:
        x, g, v: the averages of the three, `[..., channels]`, as all that follow.
        inverse: one over the standard deviation of x.
        gx, vx: the averages of g x' and v x', where x' are the normalised images.
        gv: the covariance of g and v.
    """

    x: Tensor
    g: Tensor
    v: Tensor
    inverse: Tensor
    gx: Tensor
    vx: Tensor
    gv: Tensor


def plain_moments(grad: Tensor, cotangent: Tensor, x: Tensor, eps: float) -> Moments:
    """The moments by operations that can be differentiated."""

    def average(x: Tensor) -> Tensor:
        return x.mean((-4, -2, -1))

    mean, g, v = average(x), average(grad), average(cotangent)
    centred = x - spread(mean)
    inverse = torch.rsqrt(average(centred.square()) + eps)
    normalised = centred * spread(inverse)
    gx, vx = average(grad * normalised), average(cotangent * normalised)
    return Moments(mean, g, v, inverse, gx, vx, average((grad - spread(g)) * cotangent))


def normalise_twice(
    cotangents: Sequence[Tensor], grad: Tensor, x: Tensor, weight: Tensor, moments: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by `grad`, `x` and `weight` of what `normalise_backward` makes of them.

    With <> for the average over a channel's pixels, x' for the normalised images and n for the number of pixels, it
    makes `weight * inverse` (g - <g> - x' <g x'>), n <g x'> and n <g>, whose cotangents are v, p and q.
    """
    (v, p, q), m = cotangents, moments
    slope = weight * m.inverse
    shared = (p - slope * m.vx) * m.inverse  # of x in the one gradient, of g in the other
    by_grad = combined(q - slope * m.v - shared * m.x, (v, slope), (x, shared))
    on_v = -slope * m.inverse * m.gx
    on_x = (slope * (3 * m.gx * m.vx - m.gv) - p * m.gx) * m.inverse.square()
    by_x = combined(-(on_x * m.x + shared * m.g + on_v * m.v), (x, on_x), (grad, shared), (v, on_v))
    return by_grad, by_x, pixels(x) * m.inverse * (m.gv - m.gx * m.vx)


def run_normalise_twice(
    v: Tensor,
    p: Tensor,
    q: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    by_weight: Tensor,
    by_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalise_twice` by torch's own kernel, which sums over pixels in one pass, and by the sums known already."""
    n = pixels(x)
    grad, v = dense(grad, x), dense(v, x)
    vx, totals = sums(v, x, mean, inverse)
    gv, _ = sums(grad, v, totals / n, torch.ones_like(mean))
    moments = Moments(mean, by_bias / n, totals / n, inverse, by_weight / n, vx / n, gv / n)
    return normalise_twice((v, p, q), grad, x, weight, moments)


NORMALISE = define(
    "normalise(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)", run_normalise
)
NORMALISE_BACKWARD = define(
    "normalise_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor inverse, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    run_normalise_backward,
)
NORMALISE_TWICE = define(
    "normalise_twice(Tensor v, Tensor p, Tensor q, Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor inverse,"
    " Tensor by_weight, Tensor by_bias) -> (Tensor, Tensor, Tensor)",
    run_normalise_twice,
)


def keep_normalise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def normalise_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.mlframework.normalise_backward(grad, *ctx.saved_tensors, ctx.eps), None


def keep_normalise_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def normalise_backward_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, weight, *known = ctx.saved_tensors
    if torch.is_grad_enabled():  # a third derivative may follow
        found = normalise_twice(cotangents, grad, x, weight, plain_moments(grad, cotangents[0], x, ctx.eps))
    else:
        found = torch.ops.mlframework.normalise_twice(*cotangents, grad, x, weight, *known)
    return *found, None, None, None


def together(name: str) -> None:
    """Registers that an operator takes tasks as axes in front of all its tensors."""
    operator = getattr(torch.ops.mlframework, name.partition("::")[2])

    def run(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def in_front(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

        results = operator(*map(in_front, inputs, in_dims))
        return results, (0,) * len(results)

    torch.library.register_vmap(name, run)


torch.library.register_autograd(NORMALISE, normalise_backward, setup_context=keep_normalise)
torch.library.register_autograd(NORMALISE_BACKWARD, normalise_backward_backward, setup_context=keep_normalise_backward)
together(NORMALISE)
together(NORMALISE_BACKWARD)
together(NORMALISE_TWICE)


patches = torch.ops.mlframework.patches
convolve = torch.ops.mlframework.convolve
normalise = torch.ops.mlframework.normalise
