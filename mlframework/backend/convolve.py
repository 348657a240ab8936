"""Convolution of stacked tasks, each with weights of its own.

Eagerly it is torch's grouped convolution: tasks are groups of channels. A compiler gets small convolutions unfolded:
the patches as rows of a matrix, times the weights, a batched product over tasks. Of larger ones with weights of each
task it gets, on a CPU, torch's kernels for one task after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mlframework.backend.products import Bilinear
from mlframework.backend.tracing import is_traced

__all__ = ["WithoutIdleStrides", "convolve", "max_pool"]

#: Numbers for height and width.
Pair = Sequence[int]

#: Multiplications of a task up to which a traced convolution is unfolded; and those where tasks have their own weights.
SMALL, MEDIUM = 1_000_000, 4_000_000

#: Channels up to which weights of each task are unfolded whatever the size: there is little to unfold.
FEW_CHANNELS = 3


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """Each task's images, convolved.

    Args:
        x: `[tasks, n, in_channels, height, width]`.
        weight: `[tasks, out_channels, in_channels, *kernel]`, or without tasks where they share it.
        bias: `[tasks, out_channels]`, or without tasks; None: there is none.
        stride, padding: of both axes.

    Returns:
        `[tasks, n, out_channels, ...]`.
    """
    has_own_weights = weight.dim() == 5 and len(weight) > 1 and x.device.type == "cpu"
    unfold = is_traced() and pays_unfolded(x, weight, stride, padding, has_own_weights)
    if unfold or (is_traced() and has_own_weights):
        stacks = weight.expand(len(x), *weight.shape[-4:])
        shapes = x.shape[-2:], weight.shape[-2:], stride, padding
        y = Bilinear.apply(None, x, stacks, unfolded if unfold else in_turn, *shapes)
        # One bias for each image: its gradient is then summed image by image.
        return y if bias is None else y + bias.unsqueeze(-2).expand(*bias.shape[:-1], x.shape[1], -1)[..., None, None]
    images = x.transpose(0, 1)  # tasks inside of images, so that batch norm finds tasks beside channels
    if weight.dim() == 4 and (bias is None or bias.dim() == 1):
        y = F.conv2d(images.flatten(0, 1), weight, bias, stride, padding).unflatten(0, images.shape[:2])
    else:
        tasks, out_channels = len(x), weight.shape[-4]
        weight = weight.expand(tasks, *weight.shape[-4:]).flatten(0, 1)
        bias = None if bias is None else bias.expand(tasks, out_channels).flatten()
        y = F.conv2d(images.flatten(1, 2), weight, bias, stride, padding, groups=tasks)
        y = y.unflatten(1, (tasks, out_channels))
    return y.transpose(0, 1)


class WithoutIdleStrides(TorchFunctionMode):
    """Within it, a kernel that covers the whole image has stride 1: it stands in one place, whatever its stride.

    In bfloat16, torch 2.13.0 leaves elements of such a weight's gradient unwritten on a CPU, if the image is one pixel.
    """

    def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if called in (torch.conv1d, torch.conv2d, torch.conv3d):
            return called(**with_strides_that_count(*args, **(kwargs or {})))
        return called(*args, **(kwargs or {}))


def with_strides_that_count(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    """The arguments of one of torch's convolutions, with stride 1 where the kernel covers the image."""
    axes = weight.dim() - 2
    if not isinstance(padding, str):
        each = ([v] if isinstance(v, int) else [*v] for v in (padding, dilation))
        around, apart = (v * (axes // len(v)) for v in each)
        image, kernel = input.shape[-axes:], weight.shape[2:]
        if all(i + 2 * p == d * (k - 1) + 1 for i, p, d, k in zip(image, around, apart, kernel, strict=True)):
            stride = 1
    found = {"input": input, "weight": weight, "bias": bias, "stride": stride}
    return {**found, "padding": padding, "dilation": dilation, "groups": groups}


def pays_unfolded(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, has_own_weights: bool) -> bool:
    """Whether a compiled convolution is faster unfolded."""
    positions = math.prod(sizes(x.shape[-2:], weight.shape[-2:], stride, padding))
    products = x.shape[1] * (1 if weight.dim() == 5 else len(x)) * positions * math.prod(weight.shape[-4:])
    if has_own_weights:
        return products < MEDIUM or weight.shape[2] <= FEW_CHANNELS
    return products < SMALL


def max_pool(x: Tensor) -> Tensor:
    """The largest of each 2x2 pixels of images `[..., channels, height, width]`, by comparisons, which fuse.

    Of equal pixels the first one gets the gradient, as in `nn.MaxPool2d`.
    """
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    pixels = x[..., : 2 * height, : 2 * width].movedim(-3, -1).unflatten(-3, (height, 2)).unflatten(-2, (width, 2))
    first, *others = (pixel for line in pixels.unbind(-4) for pixel in line.unbind(-2))
    for other in others:
        first = torch.where((other > first) | other.isnan(), other, first)
    return first.movedim(-1, -3)


def unfolded(y: Any, x: Any, weight: Any, image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Of results, images and weights, as `convolve` has them, the one that is None, by products over all tasks."""
    if y is None:
        y = patches(x, kernel, stride, padding) @ matrix(weight).mT
        return y.unflatten(-2, (x.shape[1], *sizes(image, kernel, stride, padding))).movedim(-1, -3)
    if x is None:
        rows = pixels(y) @ matrix(weight)
        rows = rows.view(-1, y.shape[-2] * y.shape[-1], rows.shape[-1])
        return overlay(rows, image, kernel, stride, padding).unflatten(0, y.shape[:2]).movedim(-1, -3)
    weight = pixels(y).mT @ patches(x, kernel, stride, padding)
    return weight.unflatten(-1, (*kernel, x.shape[-3])).movedim(-1, -3)


def in_turn(y: Any, x: Any, weight: Any, image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The same by torch's kernels, task by task, with channels last, as they are fastest."""
    known = zip(*([last(task) for task in tensor] for tensor in (y, x, weight) if tensor is not None), strict=True)
    if y is None:
        found = [F.conv2d(a, w, None, stride, padding) for a, w in known]
    else:
        others = [*stride], [*padding], [1, 1], False, [0, 0], 1, [x is None, weight is None, False]
        unknown = (y.shape[1], *image, weight.shape[2]) if x is None else (y.shape[2], *kernel, x.shape[2])
        empty = y.new_empty(unknown).movedim(-1, 1)
        pairs = ((g, empty, t) if x is None else (g, t, empty) for g, t in known)
        found = [torch.ops.aten.convolution_backward(*three, None, *others)[int(weight is None)] for three in pairs]
    return torch.stack([one.movedim(1, -1) for one in found]).movedim(-1, 2)


def last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def sizes(image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple[int, ...]:
    """Height and width of the result of a convolution."""
    return tuple((i + 2 * p - k) // s + 1 for i, k, s, p in zip(image, kernel, stride, padding, strict=True))


def matrix(weight: Tensor) -> Tensor:
    """Weights as matrices `[tasks, out, kernel * channels]`."""
    return weight.movedim(-3, -1).contiguous().flatten(-3)


def pixels(x: Tensor) -> Tensor:
    """Images as rows `[tasks, n * positions, channels]`."""
    return x.movedim(-3, -1).contiguous().flatten(-4, -2)


def patches(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Images to the patches that a kernel sees, `[tasks, n * positions, kernel * channels]`."""
    (height, width), (high, wide) = sizes(x.shape[-2:], kernel, stride, padding), kernel
    tasks, n, channels, *_ = x.shape
    x = x.movedim(-3, -1)
    if any(padding):
        x = torch.constant_pad_nd(x, [0, 0, padding[1], padding[1], padding[0], padding[0]])
    x = x.flatten(0, 1).contiguous()
    per_image, per_row, per_pixel, _ = x.stride()
    # Pixels that stand side by side in memory are copied in one go.
    view = x.as_strided(
        (tasks * n, height, width, high, wide * channels),
        (per_image, stride[0] * per_row, stride[1] * per_pixel, per_row, 1),
    )
    return view.reshape(tasks, n * height * width, high * wide * channels)


def overlay(rows: Tensor, image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The sum of patches `[n, positions, kernel * channels]` where they lie in images `[n, height, width, channels]`.

    No place is written to twice, so that a compiler can fuse it.
    """
    (high, wide), (down, across), (top, left) = kernel, stride, padding
    n, channels = len(rows), rows.shape[-1] // (high * wide)
    taps = rows.view(n, *sizes(image, kernel, stride, padding), high, wide, channels)
    frame = tuple(-(-(i + p) // s) for i, p, s in zip(image, padding, stride, strict=True))

    def under(y: int, z: int) -> Tensor:
        """The pixels, of every `stride` one, that lie under the same elements of the kernel."""
        parts = [
            moved(taps[:, :, :, i, j], (i // down, j // across), frame)
            for i in range(y, high, down)
            for j in range(z, wide, across)
        ]
        return sum(parts[1:], parts[0]) if parts else rows.new_zeros(n, *frame, channels)

    lines = [torch.stack([under(y, z) for z in range(across)], dim=3) for y in range(down)]
    whole = torch.stack(lines, dim=2).contiguous()  # [n, height, down, width, across, channels]
    per_line = frame[1] * across * channels
    # Read by strides, it is written to memory once, rather than computed anew by each of its readers.
    return whole.as_strided(
        (n, *image, channels), (frame[0] * down * per_line, per_line, channels, 1), top * per_line + left * channels
    )


def moved(x: Tensor, by: Pair, frame: Pair) -> Tensor:
    """Images `[n, height, width, channels]`, moved down and right in a frame of zeros, which cuts them off."""
    below, right = (size - offset - now for size, offset, now in zip(frame, by, x.shape[1:3], strict=True))
    return torch.constant_pad_nd(x, [0, 0, by[1], right, by[0], below])
