"""Layers whose outputs are scaled by learned factors of each example, on which a regulariser may put noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import Composed, Run, Stack
from mlframework.base_layers.conv4 import Conv4
from mlframework.episode import TaskSpec

__all__ = ["Perturbed", "PerturbedConv4"]


class Perturbed(Composed):
    """A block's output times a factor of each example and channel: `softplus(scale(x) + noise)`.

    `scale` is linear in the block's input, averaged over positions. It starts at a factor of 1. `noise`, a number or
    `[n, outputs]`, is 0 unless `MetaDropout` puts random numbers there.

    Args:
        block: inputs `[n, inputs, *positions]` to outputs `[n, outputs, *positions]`, positions in any number.
        inputs, outputs: channels.
        axes: how many axes of positions there are: 2 of images.

    Reference: Lee, Nam, Yang, Hwang, Meta Dropout, 2020, arXiv:1905.12914, section 3. Deviations: one factor for a
        channel, where the paper has one for each number of a layer; it scales the block's output, not the input of its
        rectifier.
    """

    noise: Tensor

    def __init__(self, block: nn.Module, inputs: int, outputs: int, *, axes: int = 0) -> None:
        super().__init__()
        self.block, self.scale, self.axes = block, nn.Linear(inputs, outputs), axes
        nn.init.zeros_(self.scale.weight)
        nn.init.constant_(self.scale.bias, math.log(math.e - 1))  # where softplus is 1
        self.register_buffer("noise", torch.zeros(()), persistent=False)

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        logits = run("scale", x.mean(tuple(range(-self.axes, 0))) if self.axes else x)
        noise = self.noise[: logits.shape[-2]] if self.noise.dim() else self.noise  # a mini-batch has fewer rows
        factor = F.softplus(logits + noise)
        return run("block", x) * factor.view(*factor.shape, *(1 for _ in range(self.axes)))


class PerturbedConv4(Conv4):
    """`Conv4` whose four blocks are `Perturbed`; see there for the arguments."""

    def __init__(self, spec: TaskSpec, *, filters: int = 64, downsample: str = "stride", norm: str = "batch") -> None:
        super().__init__(spec, filters=filters, downsample=downsample, norm=norm)
        assert isinstance(self.features, Stack)
        *blocks, end = list(self.features)
        inputs = [spec.x_shape[0], *[filters] * (len(blocks) - 1)]
        self.features = Stack(*(Perturbed(b, n, filters, axes=2) for b, n in zip(blocks, inputs, strict=True)), end)
