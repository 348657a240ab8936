"""Convolution whose weights may differ from task to task.

Three ways, each differentiable to any order. *Unfolded*: the patches as rows of a matrix, times the weights, which over
tasks is one batched product of matrices. *Native*: torch's kernels with channels last, one task after another. *Torch*:
its convolution as it is, where there is one task, or weights that all share; and on a GPU, where tasks become groups of
channels. `method_for` chooses by the shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch

from mlframework.backend.operators import Pair, convolve, is_traced, sizes, tracked, unfolded

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
        in_channels: of the images.
        products: multiplications for each task.
        device: its kind.
    """

    tasks: int
    in_channels: int
    products: int
    device: str

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Shape:
        """The shape of a convolution, under `vmap` or not."""
        tasks = vmapped(x) if vmapped(weight) > 1 else 1
        images = len(x) if tasks > 1 else len(x) * vmapped(x)
        height, width = sizes((x.shape[-2], x.shape[-1]), tuple(weight.shape[2:]), stride, padding)
        return cls(tasks, x.shape[1], images * height * width * math.prod(weight.shape), x.device.type)


def vmapped(x: Tensor) -> int:
    """How many tensors stand behind one that `vmap` shows; 1 outside of it."""
    return unwrapped(x).numel() // max(x.numel(), 1)


def unwrapped(x: Tensor) -> Tensor:
    """The tensor behind one that `vmap` shows."""
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


#: Multiplications for each task, below which compiled steps unfold, and below which tasks unfold on a CPU.
SMALL, MEDIUM = 1_000_000, 4_000_000

#: Channels up to which tasks unfold on a CPU, whatever the size: there is little to unfold.
FEW_CHANNELS = 3


def method_for(shape: Shape, *, compiled: bool = False) -> str:
    """The method for a shape, by rule, so that the numbers never depend on a stopwatch.

    Torch's own is the fastest where there is one task, and on a GPU, where tasks become groups of channels. On a CPU
    tasks with weights of their own are faster unfolded where they are small, or have few channels, else by torch's
    kernels in turn: `benchmarks/convolutions.py` measures it.

    Args:
        shape: of the convolution.
        compiled: whether it is to be part of a graph, where what is small is faster unfolded.
    """
    if compiled and shape.products < SMALL:
        return "unfolded"
    if shape.device != "cpu" or shape.tasks == 1:
        return "torch"
    return "unfolded" if shape.products < MEDIUM or shape.in_channels <= FEW_CHANNELS else "native"
