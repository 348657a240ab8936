"""Predictive densities of a regression: a network's outputs as a distribution of the target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_update import at_least, positive
from mlframework.meta_layers.predictive import normal_nll

__all__ = ["BarDensity", "Density", "GaussianDensity"]


class Density(KeepsArguments, nn.Module, ABC):
    """A family of densities over each value of a target; values are independent given the outputs."""

    @abstractmethod
    def outputs(self, values: int) -> int:
        """How many outputs the network has for a target of so many values."""

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """The means `[..., values]` for outputs `[..., outputs]`."""

    @abstractmethod
    def variance(self, outputs: Tensor) -> Tensor:
        """The variances `[..., values]`, likewise."""

    @abstractmethod
    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Minus the logarithm of the density of targets `[..., values]`, in nats: its mean over the values `[...]`."""


class GaussianDensity(Density):
    """A Gaussian: a mean, and a standard deviation of at least `least`."""

    def __init__(self, *, least: float = 1e-3) -> None:
        super().__init__()
        self.least = positive("least", least)

    def outputs(self, values: int) -> int:
        return 2 * values

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.chunk(2, dim=-1)[0]

    def variance(self, outputs: Tensor) -> Tensor:
        return (self.least + F.softplus(outputs.chunk(2, dim=-1)[1])).square()

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        return normal_nll(self.mean(outputs), self.variance(outputs), y)


class BarDensity(Density):
    """A histogram whose bars have probabilities from the network: it takes any shape, with several peaks as well.

    Borders of bars are quantiles of a Gaussian with mean 0 and standard deviation `spread`: under it all bars are
    equally likely. Beyond the outermost borders there is half a Gaussian on either side. Its mean is that of the tail
    that it replaces.

    Args:
        count: bars.
        spread: of the targets.

    Reference: Mueller et al., Transformers Can Do Bayesian Inference, 2022, arXiv:2112.10510, section 4 (Riemann
        distribution). Deviations: the borders come from a formula, where the paper draws targets from the prior; the
        outer halves have the mean of the tail, where the paper gives the width of the last bar half of their weight.
    """

    borders: Tensor  # [count - 1]
    centres: Tensor  # means of the bars [count]
    squares: Tensor  # means of their squares [count]

    def __init__(self, *, count: int = 100, spread: float = 1.0) -> None:
        super().__init__()
        self.count, self.spread = at_least("count", count, 3), positive("spread", spread)
        levels = torch.arange(1, count, dtype=torch.float64) / count
        borders = torch.special.ndtri(levels)
        last = float(borders[-1])
        excess = count * math.exp(-last * last / 2) / math.sqrt(2 * math.pi) - last  # of a tail, on average
        inner = (borders[1:] + borders[:-1]) / 2
        ends = torch.tensor([last + excess], dtype=torch.float64)
        self.tail = spread * excess * math.sqrt(math.pi / 2)  # scale of the outer halves
        number = torch.get_default_dtype()
        self.register_buffer("borders", (spread * borders).to(number), persistent=False)
        self.register_buffer("centres", (spread * torch.cat([-ends, inner, ends])).to(number), persistent=False)
        within = torch.cat([ends * 0, borders.diff().square() / 12, ends * 0])
        within[[0, -1]] = excess**2 * (math.pi / 2 - 1)  # of half a Gaussian, by its mean
        self.register_buffer("squares", self.centres.square() + (spread**2 * within).to(number), persistent=False)

    def outputs(self, values: int) -> int:
        return values * self.count

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(-1, (-1, self.count)).softmax(-1) @ self.centres

    def variance(self, outputs: Tensor) -> Tensor:
        bars = outputs.unflatten(-1, (-1, self.count)).softmax(-1)
        return bars @ self.squares - (bars @ self.centres).square()

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        logs = outputs.unflatten(-1, (-1, self.count)).log_softmax(-1)
        bar = torch.bucketize(y, self.borders)
        chosen = logs.gather(-1, bar.unsqueeze(-1)).squeeze(-1)
        return -(chosen + self.log_within(bar, y)).mean(-1)

    def log_within(self, bar: Tensor, y: Tensor) -> Tensor:
        """The logarithm of the density of targets inside their bar, of the shape of both."""
        widths = self.borders.diff()
        inside = -widths[(bar - 1).clamp(0, len(widths) - 1)].log()
        beyond = torch.where(bar == 0, self.borders[0] - y, y - self.borders[-1]).clamp(min=0)
        outside = math.log(math.sqrt(2 / math.pi) / self.tail) - (beyond / self.tail).square() / 2
        return torch.where((bar == 0) | (bar == self.count - 1), outside, inside)
