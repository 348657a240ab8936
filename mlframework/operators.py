"""Operators of convolution, each differentiable to any order, and batched over tasks by `vmap`.

Compilers do not look into them, which is what makes them fast: what is fused with a gather is computed as often as the
gather reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pair", "convolve", "patches", "sizes"]

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


def define(schema: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> str:
    """Registers an operator that compilers do not look into; `fake` gives the shape of its result."""
    name = f"mlframework::{LIBRARY.define(schema)}"
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
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


patches = torch.ops.mlframework.patches
convolve = torch.ops.mlframework.convolve
