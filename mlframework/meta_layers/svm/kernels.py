"""Similarities of features, by which a task's model sees its support set."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.svm.positive import Positive

__all__ = ["Kernel", "LinearKernel", "RBFKernel"]


class Kernel(KeepsArguments, nn.Module, ABC):
    """A positive semi-definite similarity of two examples."""

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities `[tasks, n, m]` of features `a` `[tasks, n, d]` to features `b` `[tasks, m, d]`."""

    def learned(self) -> dict[str, Tensor]:
        """The kernel's own numbers that are learned, detached, to be reported."""
        return {}


class LinearKernel(Kernel):
    """`<a, b> + constant`: a model that is linear in the features.

    Args:
        constant: the square of a feature that all examples have in common, which gives each output an offset; the
            regulariser holds it small like any other weight. 0 leaves it out.

    >>> import torch
    >>> LinearKernel()(torch.ones(1, 2, 3), torch.ones(1, 1, 3)).flatten()
    tensor([3., 3.])
    """

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = at_least("constant", constant, 0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT + self.constant


class RBFKernel(Kernel):
    """`exp(-gamma |a - b|^2 / d)`, with the mean squared difference of `d` features, so that `gamma` fits any width.

    Args:
        gamma: how fast similarity falls with distance; 1 is scikit-learn's `gamma="auto"`.
        learn: whether the outer loop learns `gamma`, from there on, through its logarithm.

    >>> import torch
    >>> RBFKernel(gamma=2.0)(torch.ones(1, 1, 3), torch.zeros(1, 1, 3)).log()
    tensor([[[-2.]]], grad_fn=<LogBackward0>)
    """

    def __init__(self, gamma: float = 1.0, *, learn: bool = True) -> None:
        super().__init__()
        self.positive = Positive({"gamma": gamma}, learn=["gamma"] if learn else [])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # The differences themselves: |a|^2 - 2ab + |b|^2 would cancel in float32.
        distances = (a.unsqueeze(2) - b.unsqueeze(1)).square().mean(-1)
        return (-self.positive["gamma"] * distances).exp()

    def learned(self) -> dict[str, Tensor]:
        return self.positive.learned()
