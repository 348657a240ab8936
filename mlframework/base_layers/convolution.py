"""Convolution whose weights may differ from task to task.

Three ways, each differentiable to any order. *Unfolded*: the patches as rows of a matrix, times the weights, which over
tasks is one batched product of matrices. *Native*: torch's kernels with channels last, one task after another. *Torch*:
its convolution as it is, where there is one task, or weights that all share; and on a GPU, where tasks become groups of
channels. On a CPU small images are faster unfolded, large ones by torch's kernels; which it is for a shape is measured
once, and remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch

from mlframework.devices import name_of
from mlframework.operators import Pair, convolve, is_traced, sizes, tracked, unfolded
from mlframework.tuning import fastest, known

__all__ = ["METHODS", "Convolution", "Shape", "method_for"]


class Convolution(nn.Conv2d):
    """`nn.Conv2d`, quick where its weights are a task's own.

    It has the parameters, names and results of `nn.Conv2d`, for what nearly all networks use: one group, no dilation,
    padding with zeros; everything else is left to `nn.Conv2d`.

    >>> Convolution(3, 8, 3, padding=1)(torch.zeros(2, 3, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, in_channels, height, width]` to `[n, out_channels, ...]`."""
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        # torch.func.grad and its like take no operators but torch's own.
        if not plain or isinstance(self.padding, str) or tracked(x) or tracked(self.weight):
            return super().forward(x)
        name = method_for(Shape.of(x, self.weight, self.stride, self.padding), compiled=is_traced())
        if name == "torch":
            return super().forward(x)  # which adds the bias, too
        y = METHODS[name](x, self.weight, self.stride, self.padding)
        # For each image, so that its gradient is summed image by image.
        return y if self.bias is None else y + self.bias.expand(len(y), -1)[..., None, None]


def of_torch(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    return torch.conv2d(x, weight, None, list(stride), list(padding))


METHODS: dict[str, Callable[[Tensor, Tensor, Pair, Pair], Tensor]] = {
    "unfolded": unfolded,
    "torch": of_torch,
    "native": convolve,
}


class Shape(NamedTuple):
    """What decides which way to convolve is faster.

    Attributes:
        tasks: that have weights of their own; 1 where all share them.
        shared: whether all share them, under `vmap`: then nobody adapts them, and there is no second derivative.
        images: of each task.
        in_channels, out_channels: of the images, before and after.
        height, width: of the images.
        kernel, stride, padding: of the convolution.
        dtype, device: of the numbers.
        differentiated: whether a gradient by the images is wanted too.
    """

    tasks: int
    shared: bool
    images: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dtype: str
    device: str
    differentiated: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Shape:
        """The shape of a convolution, under `vmap` or not."""
        n, channels, height, width = x.shape
        tasks = vmapped(x) if vmapped(weight) > 1 else 1
        return cls(
            tasks,
            functorch.is_batchedtensor(x) and not functorch.is_batchedtensor(weight),
            n if tasks > 1 else n * vmapped(x),
            channels,
            len(weight),
            height,
            width,
            tuple(weight.shape[2:]),
            tuple(stride),
            tuple(padding),
            str(x.dtype).removeprefix("torch."),
            x.device.type,
            unwrapped(x).requires_grad,
        )


def vmapped(x: Tensor) -> int:
    """How many tensors stand behind one that `vmap` shows; 1 outside of it."""
    return unwrapped(x).numel() // max(x.numel(), 1)


def unwrapped(x: Tensor) -> Tensor:
    """The tensor behind one that `vmap` shows."""
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


#: Below as many multiplications for each task, nothing is measured.
SMALL = 1_000_000

#: By how much torch's kernels have to be faster: what is unfolded is faster still in compiled steps.
MARGIN = 0.2


def method_for(shape: Shape, *, compiled: bool = False) -> str:
    """The faster method for a shape, as it was first measured on this machine.

    What is small is torch's where there is one task, or a GPU, so that its calls take the shortest way; else unfolded.

    While a step is traced nothing can be measured: it has been taken before, eagerly.

    Args:
        shape: of the convolution.
        compiled: whether it is to be part of a graph, where what is small is faster unfolded.
    """
    height, width = sizes((shape.height, shape.width), shape.kernel, shape.stride, shape.padding)
    products = shape.images * height * width * shape.kernel[0] * shape.kernel[1] * shape.in_channels
    grouped = shape.device != "cpu" or shape.tasks == 1
    if products * shape.out_channels < SMALL:
        return "torch" if grouped and not compiled else "unfolded"
    names = [name for name in METHODS if name != "torch" or grouped]
    # Of float64 as of float32, so that a step that is checked in float64 is the same step.
    described = " ".join(map(str, shape._replace(dtype="", device=name_of(torch.device(shape.device)))))
    question = f"convolution {described} by {' '.join(names)}, margin {MARGIN}"
    answer = known(question)
    if answer is not None and answer in names:
        return answer
    if torch._C._len_torch_dispatch_stack():
        return "native"
    return fastest(question, {name: functools.partial(differentiate, name, shape) for name in names}, margin=MARGIN)


def differentiate(method: str, shape: Shape) -> None:
    """Convolves tensors of a shape, and takes the gradient, and where it is adapted the second one, as in a step."""
    dtype = getattr(torch, shape.dtype)
    images = (shape.tasks, shape.images, shape.in_channels, shape.height, shape.width)
    x = torch.ones(images, dtype=dtype, device=shape.device, requires_grad=shape.differentiated)
    weights = (shape.tasks, shape.out_channels, shape.in_channels, *shape.kernel)
    weight = torch.ones(weights, dtype=dtype, device=shape.device, requires_grad=True)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return METHODS[method](x, weight, shape.stride, shape.padding)

    with torch.enable_grad():
        loss = torch.func.vmap(convolve)(x, weight).square().sum()
        wanted = [x, weight] if shape.differentiated else [weight]
        if shape.shared:
            torch.autograd.grad(loss, wanted)
            return
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), wanted)
