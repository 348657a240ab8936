"""Operators of convolution, differentiable to any order, and batched over tasks by `vmap`.

Images are `[..., n, channels, height, width]`, weights `[..., out, channels, *kernel]`, channels last in memory; axes
in front are tasks. Eagerly an operator runs as it stands here; a compiler gets what stands for it in `TRACED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

__all__ = [
    *("ONCE", "TRACED", "Pair", "convolve", "define", "differentiated", "is_traced", "named", "sizes", "tracked"),
    "unfolded",
]

LIBRARY = torch.library.Library("mlframework", "DEF")

#: By operator, what a compiler traces in its place.
TRACED: dict[Any, Callable[..., Any]] = {}

#: Whether what runs is differentiated once at most, for which torch's own kernels are quick.
ONCE = ContextVar("once", default=False)

#: Numbers for height and width.
Pair = Sequence[int]


def sizes(image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple[int, ...]:
    """Height and width of what a convolution makes of an image."""
    return tuple((i + 2 * p - k) // s + 1 for i, k, s, p in zip(image, kernel, stride, padding, strict=True))


def define(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any], traced: Callable[..., Any] | None = None
) -> str:
    """Registers an operator, and returns its name.

    Args:
        schema: its name and types.
        function: runs it.
        fake: gives tensors like its results, for tracing.
        traced: what compilers trace in its place; None: they do not look into it.
    """
    name = f"mlframework::{LIBRARY.define(schema)}"
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake)
    if traced is not None:
        TRACED[named(name).default] = traced
    return name


def named(name: str) -> Any:
    """The operator of a name."""
    return getattr(torch.ops.mlframework, name.partition("::")[2])


def tracked(x: Tensor) -> bool:
    """Whether a tensor is one that `torch.func.grad`, `jvp` or their like follows."""
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return torch.autograd.forward_ad._current_level >= 0


@contextmanager
def differentiated(*, once: bool) -> Iterator[None]:
    """Tells what runs inside whether the gradients of it are constants to whoever takes others."""
    token = ONCE.set(once)
    try:
        yield
    finally:
        ONCE.reset(token)


def is_traced() -> bool:
    """Whether tensors stand for others, in a graph to be compiled."""
    return bool(torch._C._len_torch_dispatch_stack()) and torch._guards.detect_fake_mode() is not None


# Patches and their sum, the adjoint of each other, of images `[n, height, width, channels]`.


def patches(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """`[n, height, width, channels]` to the patches that a kernel sees, `[n, positions, kernel * channels]`."""
    n, *image, channels = x.shape
    (height, width), (high, wide) = sizes(image, kernel, stride, padding), kernel
    if any(padding):
        x = torch.constant_pad_nd(x, [0, 0, padding[1], padding[1], padding[0], padding[0]])
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


def traced_overlay(rows: Tensor, image: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """`overlay` without writing to a place twice, so that it can be fused."""
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
    # By strides: what is read by its place in memory is there before, rather than computed by each who reads it.
    return whole.as_strided(
        (n, *image, channels), (frame[0] * down * per_line, per_line, channels, 1), top * per_line + left * channels
    )


def moved(x: Tensor, by: Pair, frame: Pair) -> Tensor:
    """Images `[n, height, width, channels]`, down and across, in a frame of zeros; what leaves it is lost."""
    below, right = (size - offset - now for size, offset, now in zip(frame, by, x.shape[1:3], strict=True))
    return torch.constant_pad_nd(x, [0, 0, by[1], right, by[0], below])


# A convolution and its gradients by input and by weight. Each is linear in both arguments, and the derivatives of any
# are the other two.

CONVOLVE = "(Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor"
BY_INPUT = "_by_input(Tensor grad, Tensor weight, int[] image, int[] stride, int[] padding) -> Tensor"
BY_WEIGHT = "_by_weight(Tensor grad, Tensor x, int[] kernel, int[] stride, int[] padding) -> Tensor"


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps an operator's arguments for the backward pass: two tensors, and the numbers that follow."""
    ctx.save_for_backward(*inputs[:2])
    ctx.numbers = inputs[2:]


def register_derivatives(*names: str) -> None:
    """Registers those of a convolution, of its gradient by input and of that by weight."""
    convolve, by_input, by_weight = map(named, names)

    def convolve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (needs_x, needs_weight, *_) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            by_input(grad, weight, x.shape[-2:], *ctx.numbers) if needs_x else None,
            by_weight(grad, x, weight.shape[-2:], *ctx.numbers) if needs_weight else None,
            *(None for _ in ctx.numbers),
        )

    def by_input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        (grad, weight), (needs_grad, needs_weight, *_) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            convolve(x, weight, *ctx.numbers[1:]) if needs_grad else None,
            by_weight(grad, x, weight.shape[-2:], *ctx.numbers[1:]) if needs_weight else None,
            *(None for _ in ctx.numbers),
        )

    def by_weight_backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        (grad, x), (needs_grad, needs_x, *_) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            convolve(x, weight, *ctx.numbers[1:]) if needs_grad else None,
            by_input(grad, weight, x.shape[-2:], *ctx.numbers[1:]) if needs_x else None,
            *(None for _ in ctx.numbers),
        )

    backwards = (convolve_backward, by_input_backward, by_weight_backward)
    for name, backward in zip(names, backwards, strict=True):
        torch.library.register_autograd(name, backward, setup_context=keep)


def register_tasks(name: str, joined: Callable[..., Tensor], *, second: bool) -> None:
    """Registers how an operator runs over tasks.

    Args:
        name: of the operator.
        joined: runs it on two arguments that both have tasks in front.
        second: whether its second argument is per image, as the first is; else it is a weight, which all images share,
            so that where it is the same for all tasks, they are images like others.
    """
    operator = named(name)

    def run(info: Any, in_dims: Sequence[int | None], a: Tensor, b: Tensor, *numbers: Any) -> tuple[Tensor, int]:
        a, b = (t if dim is None else t.movedim(dim, 0) for t, dim in zip((a, b), in_dims[:2], strict=True))
        if not second and in_dims[1] is None and b.dim() == 4:
            return operator(a.flatten(0, 1), b, *numbers).unflatten(0, a.shape[:2]), 0
        both = (
            t.expand(info.batch_size, *t.shape) if dim is None else t
            for t, dim in zip((a, b), in_dims[:2], strict=True)
        )
        return joined(*both, *numbers), 0

    torch.library.register_vmap(name, run)


# Unfolded: the patches as rows of a matrix, times the weights; over tasks a batched product.


def matrix(weight: Tensor) -> Tensor:
    """Weights as matrices `[..., out, kernel * channels]`."""
    return weight.movedim(-3, -1).contiguous().flatten(-3)


def pixels(x: Tensor) -> Tensor:
    """Images as rows `[..., n * positions, channels]`."""
    return x.movedim(-3, -1).contiguous().flatten(-4, -2)


def seen(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Images as rows of patches `[..., n * positions, kernel * channels]`."""
    last = x.movedim(-3, -1).contiguous()
    rows = patches(last.view(-1, *last.shape[-3:]), kernel, stride, padding)
    return rows.view(*x.shape[:-4], -1, rows.shape[-1])


def run_unfolded(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`[..., n, channels, height, width]` to `[..., n, out, ...]`."""
    y = seen(x, weight.shape[-2:], stride, padding) @ matrix(weight).mT
    return y.unflatten(-2, (x.shape[-4], *sizes(x.shape[-2:], weight.shape[-2:], stride, padding))).movedim(-1, -3)


def run_unfolded_by_input(
    grad: Tensor, weight: Tensor, image: Pair, stride: Pair, padding: Pair, overlay: Callable[..., Tensor] = overlay
) -> Tensor:
    """The gradient by the images, `[..., n, channels, *image]`, of that by the result `[..., n, out, ...]`."""
    rows = pixels(grad) @ matrix(weight)
    rows = rows.view(-1, grad.shape[-2] * grad.shape[-1], rows.shape[-1])
    x = overlay(rows, image, weight.shape[-2:], stride, padding)
    return x.unflatten(0, grad.shape[:-3]).movedim(-1, -3)


def run_unfolded_by_weight(grad: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient by the weights, `[..., out, channels, *kernel]`."""
    weight = pixels(grad).mT @ seen(x, kernel, stride, padding)
    return weight.unflatten(-1, (*kernel, x.shape[-3])).movedim(-1, -3)


def traced_by_input(grad: Tensor, weight: Tensor, image: Pair, stride: Pair, padding: Pair) -> Tensor:
    return run_unfolded_by_input(grad, weight, image, stride, padding, traced_overlay)


UNFOLDED = (
    define(f"unfolded{CONVOLVE}", run_unfolded, run_unfolded, run_unfolded),
    define(f"unfolded{BY_INPUT}", run_unfolded_by_input, traced_by_input, traced_by_input),
    define(f"unfolded{BY_WEIGHT}", run_unfolded_by_weight, run_unfolded_by_weight, run_unfolded_by_weight),
)
register_derivatives(*UNFOLDED)
for name in UNFOLDED:
    register_tasks(name, named(name), second=name == UNFOLDED[2])


# Native: torch's own kernels, which compilers do not look into; tasks with weights of their own follow each other.


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def run_convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`[n, channels, height, width]` to `[n, out, ...]`."""
    return channels_last(torch.conv2d(channels_last(x), channels_last(weight), None, list(stride), list(padding)))


def by_input(grad: Tensor, weight: Tensor, image: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient by the images, `[n, channels, *image]`, of that by the result `[n, out, ...]`."""
    return channels_last(
        backward(grad, fake_by_input(grad, weight, image, stride, padding), weight, stride, padding, 0)
    )


def by_weight(grad: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient by the weight, `[out, channels, *kernel]`."""
    weight = fake_by_weight(grad, x, kernel, stride, padding)
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


def empty(like: Tensor, *size: int) -> Tensor:
    """What `like` is made of, channels last in memory."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def fake_convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    return empty(x, len(x), len(weight), *sizes(x.shape[2:], weight.shape[2:], stride, padding))


def fake_by_input(grad: Tensor, weight: Tensor, image: Pair, stride: Pair, padding: Pair) -> Tensor:
    return empty(grad, len(grad), weight.shape[1], *image)


def fake_by_weight(grad: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    return empty(grad, grad.shape[1], x.shape[1], *kernel)


def one_by_one(name: str) -> Callable[..., Tensor]:
    """An operator, for one task after the other."""
    operator = named(name)

    def run(a: Tensor, b: Tensor, *numbers: Any) -> Tensor:
        return stacked([operator(*task, *numbers) for task in zip(a.unbind(), b.unbind(), strict=True)])

    return run


def stacked(parts: list[Tensor]) -> Tensor:
    """Tensors `[n, channels, height, width]` of tasks, `[tasks, ...]`, channels last in memory."""
    if len(parts) == 1:
        return parts[0].unsqueeze(0)
    return torch.stack([part.permute(0, 2, 3, 1) for part in parts]).permute(0, 1, 4, 2, 3)


NATIVE = (
    define(f"convolve{CONVOLVE}", run_convolve, fake_convolve, run_convolve),
    define(f"convolve{BY_INPUT}", by_input, fake_by_input, by_input),
    define(f"convolve{BY_WEIGHT}", by_weight, fake_by_weight, by_weight),
)
register_derivatives(*NATIVE)
for name in NATIVE:
    register_tasks(name, one_by_one(name), second=name == NATIVE[2])


convolve = torch.ops.mlframework.convolve
unfolded = torch.ops.mlframework.unfolded
