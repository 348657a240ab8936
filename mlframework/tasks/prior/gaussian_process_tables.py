"""Tables whose law is a draw from a Gaussian process, of which the exact posterior is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from mlframework.episode import Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.solvers.gaussian_process import condition, posterior
from mlframework.tasks.prior.table_generator import (
    TableGenerator,
    TableShape,
    checked_range,
    log_uniform,
    random_inputs,
)

__all__ = ["GaussianProcessTables"]

Covariance = Literal["rbf", "matern12", "matern32", "matern52"]
Inputs = Literal["uniform", "mixed"]

#: A variance that rounding cannot make negative: added to the covariance of a draw.
JITTER = 1e-9


class GaussianProcessTables(TableGenerator):
    """Targets are draws from a Gaussian process with mean 0 and variance 1, and normal noise.

    Args:
        kernel: `rbf`, or a Matern kernel with smoothness 1/2, 3/2, 5/2; of the distance of two rows.
        length: over which the function changes; one number, or `[low, high]` to draw it log-uniformly for each table.
        noise: the standard deviation of the noise, one number or `[low, high]`, at least 1e-4.
        inputs: `uniform` on [0, 1] in each column, as in the paper, or `mixed` (see `random_inputs`).

    Reference: Mueller et al. 2022, arXiv:2112.10510, section 5.1: RBF kernel with length 0.6, noise of variance 1e-4.

    >>> tables = GaussianProcessTables(kernel="rbf", length=0.6, noise=0.01)
    >>> x, y = tables.draw(TableShape(2, 5, 1, 1), torch.Generator().manual_seed(0))
    >>> x.shape, y.shape
    (torch.Size([2, 5, 1]), torch.Size([2, 5, 1]))
    """

    def __init__(
        self,
        *,
        kernel: Covariance = "rbf",
        length: float | Sequence[float] = (0.5, 4.0),
        noise: float | Sequence[float] = (0.01, 0.3),
        inputs: Inputs = "mixed",
    ) -> None:
        for field, value, options in (("kernel", kernel, Covariance), ("inputs", inputs, Inputs)):
            if value not in get_args(options):
                raise InvalidValue(field, value, f"must be one of {', '.join(get_args(options))}")
        self.kernel, self.inputs = kernel, inputs
        self.length = checked_range("length", length, least=1e-4)
        self.noise = checked_range("noise", noise, least=1e-4)

    def draw(self, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.inputs == "uniform":
            x = torch.rand(shape.inputs, generator=generator, dtype=torch.float64)
        else:
            x = random_inputs(shape, generator)
        length, noise = (log_uniform(*b, (shape.tables, 1, 1), generator) for b in (self.length, self.noise))
        variance = (noise.square() + JITTER) * torch.eye(shape.rows, dtype=x.dtype)
        factor = torch.linalg.cholesky(covariance(self.kernel, x / length, x / length) + variance)
        return x, factor @ torch.randn(shape.outputs, generator=generator, dtype=x.dtype)

    def posterior(self, support: Examples, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean `[tasks, m, 1]` and the variance `[tasks, m]` of the targets of queries `[tasks, m, columns]`.

        Raises:
            UserError: length or noise are drawn anew for each table, so that no Gaussian process is the posterior.
        """
        (length, longest), (noise, most) = self.length, self.noise
        if length < longest or noise < most:
            raise UserError("length and noise must be one number each: else the posterior is no Gaussian process")
        seen, queries, mask = support.x.double() / length, x.double() / length, support.mask
        process = condition(covariance(self.kernel, seen, seen), support.y, noise=noise**2 + JITTER, mask=mask)
        cross = covariance(self.kernel, queries, seen) * (mask > 0).unsqueeze(1)
        mean, variance = posterior(process, cross, torch.ones(queries.shape[:2], dtype=queries.dtype))
        return mean, variance + noise**2 + JITTER


def covariance(kernel: Covariance, a: Tensor, b: Tensor) -> Tensor:
    """The kernel `[tables, n, m]` of rows `a` `[tables, n, columns]` and `b` `[tables, m, columns]`, in lengths.

    Reference: Rasmussen, Williams, Gaussian Processes for Machine Learning, 2006, equations 4.9 and 4.17.
    """
    squared = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)
    if kernel == "rbf":
        return (-squared / 2).exp()
    smoothness: float = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}[kernel]
    s = math.sqrt(2 * smoothness) * squared.sqrt()
    polynomial = {"matern12": torch.ones_like(s), "matern32": 1 + s, "matern52": 1 + s + s.square() / 3}[kernel]
    return polynomial * (-s).exp()
