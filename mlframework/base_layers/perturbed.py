"""Layers whose outputs are scaled by learned factors of each example, on which a regulariser may put noise."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import Composed, Run, Stack
from mlframework.base_layers.conv4 import Conv4
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue

__all__ = ["Perturbed", "PerturbedConv4"]


class Perturbed(Composed):
    """A block's output times a factor of each example and channel: `softplus(scale(x) + deviation * noise)`.

    `scale` is linear in the block's input, averaged over positions. `noise` is standard normal: `MetaDropout` puts
    numbers `[n, outputs]` there. Without these the factor is its expectation, which starts at 1.

    Args:
        block: inputs `[n, inputs, *positions]` to outputs `[n, outputs, *positions]`, positions in any number.
        inputs, outputs: channels.
        axes: how many axes of positions there are: 2 of images.
        deviation: the standard deviation of the noise.

    Reference: Lee, Nam, Yang, Hwang, Meta Dropout, 2020, arXiv:1905.12914, section 3. Deviations: one factor for a
        channel, where the paper has one for each number of a layer; it scales the block's output, not the input of its
        rectifier.
    """

    noise: Tensor

    def __init__(self, block: nn.Module, inputs: int, outputs: int, *, axes: int = 0, deviation: float = 1.0) -> None:
        super().__init__()
        self.block, self.scale, self.axes = block, nn.Linear(inputs, outputs), axes
        if deviation < 0:
            raise InvalidValue("deviation", deviation, "must be at least 0")
        self.deviation = deviation
        nn.init.zeros_(self.scale.weight)
        nn.init.constant_(self.scale.bias, start(deviation))
        self.register_buffer("noise", torch.zeros(()), persistent=False)

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        logits = run("scale", x.mean(tuple(range(-self.axes, 0))) if self.axes else x)
        if self.noise.dim():
            factor = F.softplus(logits + self.deviation * self.noise[: logits.shape[-2]])  # a mini-batch has fewer rows
        else:
            factor = expected(logits, self.deviation)
        return run("block", x) * factor.view(*factor.shape, *(1 for _ in range(self.axes)))


#: Places and weights of Gauss-Hermite quadrature: means over a standard normal variable.
PLACES, WEIGHTS = (values.tolist() for values in np.polynomial.hermite_e.hermegauss(7))


def expected(logits: Tensor, deviation: float) -> Tensor:
    """The mean of `softplus(logits + deviation * z)` over standard normal `z`."""
    parts = [weight * F.softplus(logits + deviation * place) for place, weight in zip(PLACES, WEIGHTS, strict=True)]
    return torch.stack(parts).sum(0) / sum(WEIGHTS)


def start(deviation: float) -> float:
    """The logit whose expected factor is 1."""
    from scipy.optimize import brentq  # here: most runs need no perturbed layer

    return float(
        brentq(lambda logit: float(expected(torch.tensor(logit).double(), deviation)) - 1, -20 - deviation**2, 2)
    )


class PerturbedConv4(Conv4):
    """`Conv4` whose four blocks are `Perturbed`; see both for the arguments."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        filters: int = 64,
        downsample: str = "stride",
        norm: str = "batch",
        deviation: float = 1.0,
    ) -> None:
        super().__init__(spec, filters=filters, downsample=downsample, norm=norm)
        assert isinstance(self.features, Stack)
        *blocks, end = list(self.features)
        inputs = [spec.x_shape[0], *[filters] * (len(blocks) - 1)]
        self.features = Stack(
            *(Perturbed(b, n, filters, axes=2, deviation=deviation) for b, n in zip(blocks, inputs, strict=True)), end
        )
