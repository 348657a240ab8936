"""The four-block convolutional network of few-shot classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlframework.backend.forward import runs_per_task
from mlframework.base_layers.base_layer import BaseLayer, Stack
from mlframework.base_layers.normalisation import norm_of
from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue

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
        if len(spec.x_shape) != 3:
            why = f"reads images, this task's inputs are {spec.x_shape}: use base_layer=mlp"
            raise IncompatibleTask(f"base_layer=conv4 {why}")
        channels, height, width = spec.x_shape
        positions = (height // 2**BLOCKS) * (width // 2**BLOCKS)
        if downsample == "pool" and positions == 0:
            why = f"images of {height}x{width} are too small for four poolings: use stride"
            raise InvalidValue("downsample", downsample, why)
        pool, blocks = downsample == "pool", []
        for inputs in (channels, *[filters] * (BLOCKS - 1)):
            convolution = nn.Conv2d(inputs, filters, 3, stride=1 if pool else 2, padding=1)
            pooling = [nn.MaxPool2d(2)] if pool else []
            blocks.append(Stack(convolution, norm_of(norm, filters), *pooling, nn.ReLU()))
        end, size = (nn.Flatten(), filters * positions) if pool else (SpatialMean(), filters)
        super().__init__(Stack(*blocks, end), nn.Linear(size, spec.out_features))


class SpatialMean(nn.Module):
    """The mean over an image's positions: `[..., channels, height, width]` to `[..., channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, dim=(-2, -1))


runs_per_task(SpatialMean, lambda mean, params, x, mask: mean.forward(x))
