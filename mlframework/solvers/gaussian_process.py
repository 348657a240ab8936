"""Gaussian processes with normal noise: the exact posterior, batched over tasks; plain autograd differentiates it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.solvers.support_vectors import regularised

__all__ = ["JITTERS", "Conditioned", "condition", "log_marginal_likelihood", "posterior"]

#: Shares of a task's largest diagonal entry that are added to the diagonal: the first that leads to a factor is taken.
JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)


class Conditioned(NamedTuple):
    """A process that has seen each task's examples: `(K + noise I) dual = Y`, with `K + noise I = L L'`."""

    factor: Tensor  # `L`, lower triangular, rows of the identity for masked examples, [tasks, n, n], float64
    dual: Tensor  # 0 for masked examples, [tasks, n, k], float64
    jitter: Tensor  # what was added to the diagonal beside the noise; infinite where nothing helped, [tasks], float64


def condition(kernel: Tensor, targets: Tensor, *, noise: Tensor | float, mask: Tensor | None = None) -> Conditioned:
    """Conditions a process with mean 0 on examples, in float64, by a Cholesky factor.

    A matrix that rounding has left without a factor gets the first of `JITTERS` that gives it one, task by task. The
    choice is a constant to autograd. Where none does, the task's factor and duals are NaN.

    Args:
        kernel: `K` of the examples, without noise, `[tasks, n, n]`. Compute it in float64: the rounding of a float32
            kernel is larger than the smaller jitters.
        targets: one column per output, all with the same kernel, `[tasks, n, k]`.
        noise: variance of the noise, at least 0; a scalar, or `[tasks]`.
        mask: which examples count, `[tasks, n]`; None: all.

    Reference: Rasmussen, Williams, Gaussian Processes for Machine Learning, 2006, algorithm 2.1.
    """
    wanted = targets.double()
    if mask is not None:
        wanted = torch.where(mask.unsqueeze(-1) > 0, wanted, 0.0)
    matrix = regularised(kernel, noise, mask)
    diagonal = matrix.detach().diagonal(dim1=-2, dim2=-1)
    jitter = chosen_jitter(matrix.detach(), (diagonal if mask is None else diagonal * (mask > 0)).amax(-1))
    added = torch.where(jitter.isfinite(), jitter, torch.nan)[:, None]
    factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(added.expand(matrix.shape[:2])))[0]
    return Conditioned(factor, torch.cholesky_solve(wanted, factor), jitter)


def chosen_jitter(matrix: Tensor, scale: Tensor) -> Tensor:
    """The first of `JITTERS`, times a task's `scale`, with which its matrix has a factor; infinity if none has.

    The matrix is `[tasks, n, n]`, the scale and the result are `[tasks]`.
    """
    tried = scale * torch.tensor(JITTERS, dtype=matrix.dtype, device=matrix.device)[:, None]  # [jitters, tasks]
    diagonals = torch.diag_embed(tried.unsqueeze(-1).expand(*tried.shape, matrix.shape[-1]))
    works = torch.linalg.cholesky_ex(matrix + diagonals)[1] == 0
    return torch.where(works, tried, torch.inf).amin(0)


def posterior(conditioned: Conditioned, cross: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `[tasks, m, k]` and the variance `[tasks, m]` of the noise-free function at queries, in float64.

    The outputs share the variance. Add the noise for the variance of an observation.

    Args:
        cross: kernel of the queries with the examples, `[tasks, m, n]`; 0 in the columns of masked examples.
        variance: kernel of each query with itself, `[tasks, m]`.
    """
    cross = cross.double()
    explained = torch.linalg.solve_triangular(conditioned.factor, cross.mT, upper=False).square().sum(-2)
    # Rounding may leave a difference below 0.
    return cross @ conditioned.dual, (variance.double() - explained).clamp(min=0)


def log_marginal_likelihood(conditioned: Conditioned, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logarithm of the density of each output's targets `[tasks, n, k]`: `[tasks, k]`, in nats, in float64.

    Reference: Rasmussen, Williams 2006, equation 2.30.
    """
    wanted = targets.double()
    count = torch.tensor(float(targets.shape[1]), dtype=torch.float64, device=targets.device)
    if mask is not None:
        wanted, count = torch.where(mask.unsqueeze(-1) > 0, wanted, 0.0), (mask > 0).double().sum(1, keepdim=True)
    fit = (wanted * conditioned.dual).sum(1)
    half_determinant = conditioned.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return -0.5 * fit - half_determinant - 0.5 * math.log(2 * math.pi) * count
