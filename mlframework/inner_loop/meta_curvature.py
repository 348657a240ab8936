"""Gradients that are transformed by learned matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate, positive

__all__ = ["MetaCurvature"]


class MetaCurvature(InnerUpdate):
    """Gradient descent with a learned linear map of each parameter's gradient, one matrix per axis: `p - lr * MC(g)`.

    A linear layer's gradient is multiplied by matrices over its outputs and its inputs (`M_o g M_i^T`), a
    convolution's also by one over the positions of its kernel, taken together (`M_f`). They start as identities, which
    is SGD.

    Args:
        params: a matrix over an axis of length n has n^2 entries to learn.
        lr: the inner rate, fixed.

    Reference: Park, Oliva, Meta-Curvature, 2019, arXiv:1902.03356, section 3. Parameters of a single axis, such
        as biases and weights of norms, have a learned factor for each entry's gradient, in place of a whole matrix.
    """

    def __init__(self, params: Params, lr: float) -> None:
        super().__init__()
        self.lr = positive("lr", lr)
        self.axes = {name: len(identities(p)) for name, p in params.items()}
        self.matrices = nn.ParameterList(matrix for p in params.values() for matrix in identities(p))

    def learned(self) -> dict[str, Tensor]:
        """The matrices by parameter and axis."""
        names = [f"{name}/axis_{axis}" for name, count in self.axes.items() for axis in range(count)]
        return {name: matrix.detach() for name, matrix in zip(names, self.matrices, strict=True)}

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        matrices = iter(self.matrices)
        of = {name: list(islice(matrices, count)) for name, count in self.axes.items()}
        mapped = {name: transformed(grad, of[name]) for name, grad in grads.items()}
        return {name: p - self.lr * mapped[name] for name, p in params.items()}, state


def identities(param: Tensor) -> list[Tensor]:
    """Matrices for outputs, inputs and, of a kernel, its positions; a factor for each entry of a vector."""
    if param.dim() < 2:
        return [torch.ones_like(param)]
    sizes = param.shape if param.dim() < 4 else (*param.shape[:2], param[0, 0].numel())
    return [torch.eye(size, dtype=param.dtype, device=param.device) for size in sizes]


def transformed(grad: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The products of a stacked gradient `[tasks, out, in, ...]` with a matrix along each axis after the first."""
    if grad.dim() < 3:
        return grad * matrices[0]
    result = grad.flatten(3) if grad.dim() > 4 else grad
    for axis, matrix in enumerate(matrices, start=1):
        result = (result.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
    return result.reshape(grad.shape)
