"""Batch normalisation as an operator, differentiable to any order, and batched over tasks by `vmap`.

Images are `[..., n, channels, height, width]`, and numbers of each channel `[..., channels]`; axes in front are tasks.
Eagerly it is torch's own kernels, for the CPU. Mean and inverse standard deviation are handed from operator to operator
to save time, but derivatives regard them as what they are, functions of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from mlframework.backend.operators import ONCE, define, is_traced, named

__all__ = ["is_seen", "normalise"]

FORWARD = torch.ops.aten.native_batch_norm.out
BACKWARD = torch.ops.aten.native_batch_norm_backward.default

#: What tensors have that stand for many, but for those of `torch.func`.
BATCHED: Any = torch._C._parse_dispatch_key("Batched")


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
    if x.dim() == 4:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    y, mean, inverse = torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    for one, out, scale, shift, mu, r in by_task([x, y], [weight, bias, mean, inverse]):
        FORWARD(one, scale, shift, None, None, True, 0.0, eps, out=out, save_mean=mu, save_invstd=r)
    return y, mean, inverse


def sums(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Over a channel's pixels, the sum of `grad` times `(x - mean) * inverse`, and that of `grad`."""
    x = dense(x, x)
    if x.dim() == 4:
        return BACKWARD(dense(grad, x), x, None, None, None, mean, inverse, True, 0.0, [False, True, True])[1:]
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
    """Numbers of each channel, for all pixels."""
    return numbers.view(-1, 1, 1) if numbers.dim() == 1 else numbers[..., None, :, None, None]


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


def plain_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by images, weight and bias, by operations that can be differentiated."""
    m = plain_moments(grad, grad, x, eps)
    centred = (x - spread(m.x)) * spread(m.inverse)
    by_x = spread(weight * m.inverse) * (grad - spread(m.g) - centred * spread(m.gx))
    return by_x, pixels(x) * m.gx, pixels(x) * m.g


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


# What a compiler gets in their place: as few passes over the pixels as there can be, along which channels lie together.


def as_rows(x: Tensor) -> Tensor:
    """Images as `[..., n, positions, channels]`."""
    return x.movedim(-3, -1).flatten(-3, -2)


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """Rows as images of the shape of others."""
    return rows.unflatten(-2, like.shape[-2:]).movedim(-1, -3)


def each(numbers: Tensor) -> Tensor:
    """Numbers of each channel, for all rows."""
    return numbers[..., None, None, :]


def total(rows: Tensor) -> Tensor:
    """The sum over images and positions: image by image, since all of them are more than is near at once."""
    return rows.sum(-2).sum(-2)


def traced_normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = as_rows(x), pixels(x)
    mean = total(rows) / n
    centred = rows - each(mean)
    inverse = torch.rsqrt(total(centred * centred) / n + eps)
    return as_images(centred * each(weight * inverse) + each(bias), x), mean, inverse


def traced_normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    g, normalised, n = as_rows(grad), (as_rows(x) - each(mean)) * each(inverse), pixels(x)
    by_weight, by_bias = total(g * normalised), total(g)
    by_x = each(weight * inverse) * (g - each(by_bias / n) - normalised * each(by_weight / n))
    return as_images(by_x, x), by_weight, by_bias


def traced_normalise_twice(
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
    n = pixels(x)
    # As `normalise_twice`, but of images and gradients less their averages.
    v_rows, centred, g = as_rows(v), as_rows(x) - each(mean), as_rows(grad) - each(by_bias / n)
    average, gx = total(v_rows) / n, by_weight / n
    vx, gv = total(v_rows * centred) * inverse / n, total(v_rows * g) / n
    slope = weight * inverse
    shared = (p - slope * vx) * inverse
    by_grad = v_rows * each(slope) + centred * each(shared) + each(q - slope * average)
    on_v = -slope * inverse * gx
    on_x = (slope * (3 * gx * vx - gv) - p * gx) * inverse.square()
    by_x = centred * each(on_x) + g * each(shared) + (v_rows - each(average)) * each(on_v)
    return as_images(by_grad, x), as_images(by_x, x), n * inverse * (gv - gx * vx)


def fake_normalise(x: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight = numbers[0]
    return torch.empty_like(dense(x, x)), torch.empty_like(weight), torch.empty_like(weight)


def fake_normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_normalise(x, weight)


def fake_normalise_twice(
    v: Tensor, p: Tensor, q: Tensor, grad: Tensor, x: Tensor, weight: Tensor, *numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like, *_ = fake_normalise(x, weight)
    return like, torch.empty_like(like), torch.empty_like(weight)


NORMALISE = define(
    "normalise(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    run_normalise,
    fake_normalise,
    traced_normalise,
)
NORMALISE_BACKWARD = define(
    "normalise_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor inverse, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    run_normalise_backward,
    fake_normalise_backward,
    traced_normalise_backward,
)
NORMALISE_TWICE = define(
    "normalise_twice(Tensor v, Tensor p, Tensor q, Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor inverse,"
    " Tensor by_weight, Tensor by_bias) -> (Tensor, Tensor, Tensor)",
    run_normalise_twice,
    fake_normalise_twice,
    traced_normalise_twice,
)


def is_seen(*tensors: Tensor) -> bool:
    """Whether `vmap` or a compiler looks on."""
    return any(map(functorch.is_functorch_wrapped_tensor, tensors)) or is_traced()


def is_one_of_many(grad: Tensor) -> bool:
    """Whether a gradient stands for many, as in `torch.autograd.grad(..., is_grads_batched=True)`."""
    return torch._C._dispatch_keys(grad).has(BATCHED) or functorch.is_functorch_wrapped_tensor(grad)


def keep_normalise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def normalise_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    x, weight, mean, inverse = ctx.saved_tensors
    if torch.is_grad_enabled() and is_one_of_many(grad):  # who knows no derivatives of operators
        return *plain_backward(grad, x, weight, ctx.eps), None
    if is_seen(grad):
        backward: Callable[..., Any] = torch.ops.mlframework.normalise_backward
    else:  # there may be no second derivative to take
        backward = NormaliseBackward.apply if torch.is_grad_enabled() else run_normalise_backward
    return *backward(grad, x, weight, mean, inverse, ctx.eps), None


def keep_normalise_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def normalise_backward_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, weight, mean, inverse, by_weight, by_bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # a third derivative may follow
        found = normalise_twice(cotangents, grad, x, weight, plain_moments(grad, cotangents[0], x, ctx.eps))
    else:
        operator = torch.ops.mlframework.normalise_twice
        twice: Callable[..., Any] = operator if is_seen(*cotangents) else run_normalise_twice
        found = twice(*cotangents, grad, x, weight, mean, inverse, by_weight, by_bias)
    return *found, None, None, None


def together(name: str) -> None:
    """Registers that an operator takes tasks as axes in front of all its tensors."""
    operator = named(name)

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


class Normalise(torch.autograd.Function):
    """The operator for whom nobody looks on: a shorter way to the same."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = run_normalise(*inputs)
        keep_normalise(ctx, inputs, results)
        ctx.set_materialize_grads(False)  # those of the statistics, which have none
        return results

    backward = staticmethod(normalise_backward)


class NormaliseBackward(torch.autograd.Function):
    """Its gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = run_normalise_backward(*inputs)
        keep_normalise_backward(ctx, inputs, results)
        return results

    backward = staticmethod(normalise_backward_backward)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Images `[n, channels, height, width]` normalised by their own statistics, scaled and shifted."""
    if is_seen(x, weight, bias):
        operator: Callable[..., Any] = torch.ops.mlframework.normalise
    else:
        operator = run_normalise if ONCE.get() else Normalise.apply
    return operator(x, weight, bias, eps)[0]
