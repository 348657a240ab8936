"""Draws of a Gaussian process."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.errors import InvalidValue, nearest
from mlframework.tasks.regression.functions import Functions

__all__ = ["GaussianProcess"]

#: Added to the diagonal of a covariance, as a share of the variance, so that rounding leaves it positive.
JITTER = 1e-8


def rbf(distance: Tensor, length: float, period: float) -> Tensor:
    return (-(distance**2) / (2 * length**2)).exp()


def matern(distance: Tensor, length: float, period: float) -> Tensor:
    scaled = math.sqrt(5) * distance / length
    return (1 + scaled + scaled**2 / 3) * (-scaled).exp()


def periodic(distance: Tensor, length: float, period: float) -> Tensor:
    return (-2 * (torch.sin(math.pi * distance / period) / length) ** 2).exp()


KERNELS = {"rbf": rbf, "matern": matern, "periodic": periodic}


class GaussianProcess(Functions):
    """Draws of a Gaussian process with mean 0, at places U[-5, 5]; outputs are independent.

    Args:
        k_shot, k_query, outputs: see `Functions`.
        kernel: `rbf`, `matern` (smoothness 5/2) or `periodic`.
        length: the length scale; that of `periodic` is relative to the period's phase, as in scikit-learn's
            `ExpSineSquared`.
        deviation: the standard deviation at any place.
        period: of `periodic`.
        noise: the standard deviation of the number added to each value, support and query.

    Reference: Rasmussen, Williams, Gaussian Processes for Machine Learning, 2006, section 4.2.
    """

    def __init__(
        self,
        k_shot: int,
        k_query: int,
        *,
        outputs: int = 1,
        kernel: str = "rbf",
        length: float = 1.0,
        deviation: float = 1.0,
        period: float = 2.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(k_shot, k_query, outputs=outputs)
        if kernel not in KERNELS:
            raise InvalidValue("kernel", kernel, f"must be one of {', '.join(KERNELS)}{nearest(kernel, KERNELS)}")
        for field, value in {"length": length, "deviation": deviation, "period": period}.items():
            if not value > 0:
                raise InvalidValue(field, value, "must be above 0")
        if not noise >= 0:
            raise InvalidValue("noise", noise, "must be at least 0")
        self.kernel, self.length, self.deviation, self.period, self.noise = kernel, length, deviation, period, noise

    def covariance(self, x: Tensor) -> Tensor:
        """The covariance of the values at places `[tasks, n, 1]`, without noise: `[tasks, n, n]`."""
        return self.deviation**2 * KERNELS[self.kernel]((x - x.mT).abs(), self.length, self.period)

    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        return lambda x: self.values(x, self.spec.out_features, generator)

    def values(self, x: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
        """Joint draws at places `[tasks, n, 1]`, independent for each output: `[tasks, n, outputs]`."""
        variance = JITTER * self.deviation**2 + self.noise**2
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        normal = torch.randn(*x.shape[:2], outputs, generator=generator, dtype=x.dtype)
        return torch.linalg.cholesky(self.covariance(x) + variance * eye) @ normal
