"""Convolution whose weights may differ from task to task.

Two ways, each differentiable to any order. *Unfolded*: the patches as rows of a matrix, times the weights, which over
tasks is one batched product of matrices. *Native*: torch's own convolution, one task after another. Small images are
faster unfolded, large ones native; which it is for a shape is measured once, and remembered.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch

from mlframework.files import atomic, cache_folder
from mlframework.operators import Pair, convolve, patches, sizes

__all__ = ["METHODS", "Convolution", "Shape", "method_for"]

log = logging.getLogger(__name__)


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
        method = METHODS[method_for(Shape.of(x, self.weight, self.stride, self.padding))]
        y = method(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[:, None, None]


def unfolded(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Convolves by a product of matrices: images `[n, channels, height, width]` to `[n, out, ...]`, channels last."""
    out, kernel = len(weight), weight.shape[2:]
    height, width = sizes(x.shape[2:], kernel, stride, padding)
    rows = patches(x.permute(0, 2, 3, 1), kernel, stride, padding)
    matrix = weight.permute(2, 3, 1, 0).reshape(-1, out)
    return (rows.flatten(0, 1) @ matrix).unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)


def native(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Convolves by torch's own kernels, in channels-last memory; tasks with weights of their own follow each other."""
    return convolve(x, weight, stride, padding)


METHODS: dict[str, Callable[[Tensor, Tensor, Pair, Pair], Tensor]] = {"unfolded": unfolded, "native": native}


class Shape(NamedTuple):
    """What decides which way to convolve is faster.

    Attributes:
        tasks: that have weights of their own; 1 where all share them.
        images: of each task.
        in_channels, out_channels: of the images, before and after.
        height, width: of the images.
        kernel, stride, padding: of the convolution.
        dtype, device: of the numbers.
        threads: of the CPU.
        differentiated: whether a gradient by the images is wanted too.
    """

    tasks: int
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
    threads: int
    differentiated: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Shape:
        """The shape of a convolution, under `vmap` or not."""
        n, channels, height, width = x.shape
        tasks = vmapped(x) if vmapped(weight) > 1 else 1
        return cls(
            tasks,
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
            torch.get_num_threads(),
            unwrapped(x).requires_grad,
        )


def vmapped(x: Tensor) -> int:
    """How many tensors stand behind one that `vmap` shows; 1 outside of it."""
    return unwrapped(x).numel() // max(x.numel(), 1)


def tracked(x: Tensor) -> bool:
    """Whether a tensor is one that `torch.func.grad`, `jvp` or their like follows."""
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return torch.autograd.forward_ad._current_level >= 0


def unwrapped(x: Tensor) -> Tensor:
    """The tensor behind one that `vmap` shows."""
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


#: Below as many multiplications for each task, convolutions are not measured: they are unfolded.
SMALL = 1_000_000

#: Methods that were measured, by shape.
KNOWN: dict[str, str] = {}


def method_for(shape: Shape) -> str:
    """The faster method for a shape, as it was measured on this machine; what is small or not on a CPU is unfolded.

    What was measured is kept in the cache folder, so that a run that goes on later takes the same steps. While a step
    is traced nothing can be measured: it has been taken before, eagerly.
    """
    height, width = sizes((shape.height, shape.width), shape.kernel, shape.stride, shape.padding)
    products = shape.images * height * width * shape.kernel[0] * shape.kernel[1] * shape.in_channels
    if shape.device != "cpu" or products * shape.out_channels < SMALL:
        return "unfolded"
    key = " ".join(map(str, shape))
    if key not in KNOWN:
        KNOWN.update(remembered())
    if key not in KNOWN and torch._C._len_torch_dispatch_stack():
        return "native"
    if key not in KNOWN:
        KNOWN[key] = measured(shape)
        remember()
    return KNOWN[key]


def measured(shape: Shape) -> str:
    """Times both methods, twice differentiated as an inner loop does, on tensors of the shape."""
    dtype = getattr(torch, shape.dtype)
    size = (shape.tasks, shape.images, shape.in_channels, shape.height, shape.width)
    x = torch.ones(size, dtype=dtype, requires_grad=shape.differentiated)
    weight = torch.ones(
        (shape.tasks, shape.out_channels, shape.in_channels, *shape.kernel), dtype=dtype, requires_grad=True
    )
    inputs = [x, weight] if shape.differentiated else [weight]

    def twice(method: str) -> None:
        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            return METHODS[method](x, weight, shape.stride, shape.padding)

        with torch.enable_grad():
            loss = torch.func.vmap(convolve)(x, weight).square().sum()
            (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), inputs)

    return min(METHODS, key=lambda method: shortest(functools.partial(twice, method)))


def shortest(function: Callable[[], None]) -> float:
    """The shortest of some runs, in seconds; the first warms up."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def cache_file() -> Path:
    return cache_folder() / f"convolutions-{platform.processor() or platform.machine()}-{torch.__version__}.json"


def remembered() -> dict[str, str]:
    """What was measured before, on this kind of machine with this version of torch."""
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # not there, or damaged by something outside: measured anew
        return {}
    return {key: method for key, method in found.items() if method in METHODS} if isinstance(found, dict) else {}


def remember() -> None:
    """Adds what was measured to the cache; one that cannot be written is done without."""
    try:
        with atomic(cache_file()) as part:
            part.write_text(json.dumps({**remembered(), **KNOWN}, indent=0))
    except OSError as error:
        log.warning("convolutions are measured anew in every process: %s cannot be written (%s)", cache_file(), error)
