"""The four-block convolutional network of few-shot classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlframework.backend.operators import is_traced
from mlframework.base_layers.base_layer import BaseLayer, Stack
from mlframework.base_layers.convolution import Convolution
from mlframework.base_layers.normalisation import NORMS
from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue, nearest

__all__ = ["Conv4"]

BLOCKS = 4


class Conv4(BaseLayer):
    """Four blocks of 3x3 convolution, normalisation and ReLU; a linear head.

    Args:
        spec: the task's shapes; inputs are images `[n, channels, height, width]`.
        filters: channels of every block.
        downsample: `stride` (convolutions of stride 2, features averaged over positions: MAML's Omniglot network) or
            `pool` (2x2 max-pooling after each block, features flattened: its mini-ImageNet network).
        norm: `batch` (statistics of the batch), `group` or `none`.

    Reference: Vinyals et al. 2016, arXiv:1606.04080, section 4.1.1; Finn et al. 2017, arXiv:1703.03400, section 5.2.
    Deviation: max-pooling stands before the ReLU, which gives the same result for less work.

    >>> Conv4(TaskSpec("classification", (1, 28, 28), 5), filters=8)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 5])
    """

    def __init__(self, spec: TaskSpec, *, filters: int = 64, downsample: str = "stride", norm: str = "batch") -> None:
        if filters < 1:
            raise InvalidValue("filters", filters, "must be at least 1")
        if downsample not in ("stride", "pool"):
            raise InvalidValue("downsample", downsample, "must be stride or pool")
        if norm not in NORMS:
            raise InvalidValue("norm", norm, f"must be one of {', '.join(NORMS)}{nearest(norm, NORMS)}")
        if len(spec.x_shape) != 3:
            raise IncompatibleTask(
                f"base_layer=conv4 reads images, this task's inputs are {spec.x_shape}: use base_layer=mlp"
            )
        channels, height, width = spec.x_shape
        positions = (height // 2**BLOCKS) * (width // 2**BLOCKS)
        if downsample == "pool" and positions == 0:
            why = f"images of {height}x{width} are too small for four poolings: use stride"
            raise InvalidValue("downsample", downsample, why)
        block = pooled_block if downsample == "pool" else strided_block
        blocks = [block(channels if i == 0 else filters, filters, NORMS[norm](filters)) for i in range(BLOCKS)]
        if downsample == "pool":
            super().__init__(Stack(*blocks, nn.Flatten()), nn.Linear(filters * positions, spec.out_features))
        else:
            super().__init__(Stack(*blocks, SpatialMean()), nn.Linear(filters, spec.out_features))


def strided_block(inputs: int, outputs: int, norm: nn.Module) -> Stack:
    """Halves the image by the convolution's stride."""
    return Stack(Convolution(inputs, outputs, 3, stride=2, padding=1), norm, nn.ReLU())


def pooled_block(inputs: int, outputs: int, norm: nn.Module) -> Stack:
    """Halves the image by max-pooling."""
    return Stack(Convolution(inputs, outputs, 3, padding=1), norm, MaxPool(2), nn.ReLU())


class MaxPool(nn.MaxPool2d):
    """`nn.MaxPool2d` of 2x2 pixels, of comparisons where it is compiled: those are fused with what stands beside them.

    As there, of pixels that are equal the first one gets the gradient.

    >>> MaxPool(2)(torch.arange(12.0).view(1, 1, 3, 4))
    tensor([[[[5., 7.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return compared(x) if is_traced() else super().forward(x)


def compared(x: Tensor) -> Tensor:
    """The largest of each 2x2 pixels of images `[n, channels, height, width]`, channels last in memory."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    pixels = x[..., : 2 * height, : 2 * width].movedim(-3, -1).unflatten(-3, (height, 2)).unflatten(-2, (width, 2))
    first, *others = (pixel for line in pixels.unbind(-4) for pixel in line.unbind(-2))
    for other in others:
        first = torch.where((other > first) | other.isnan(), other, first)
    return first.movedim(-1, -3)


class SpatialMean(nn.Module):
    """The mean over an image's positions: `[n, channels, height, width]` to `[n, channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, dim=(2, 3))
