"""Similarities of features, by which a task's model sees its support set, and their numbers above 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.errors import InvalidValue
from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_update import at_least

__all__ = ["CosineKernel", "Kernel", "LinearKernel", "MaternKernel", "Positive", "RBFKernel"]


class Positive(nn.Module):
    """Named numbers above 0, fixed, or learned through their logarithms, from `values` on, if `learn` names them.

    >>> Positive({"c": 0.1, "reg": 1.0}, learn=["reg"])["reg"]
    tensor(1., grad_fn=<ExpBackward0>)
    """

    def __init__(self, values: Mapping[str, float], *, learn: Collection[str]) -> None:
        super().__init__()
        for name, value in values.items():
            if not 0 < value < math.inf:
                raise InvalidValue(name, value, "must be above 0")
        if not set(learn) <= set(values):
            raise InvalidValue("learn", list(learn), f"must hold some of {', '.join(values)}, or nothing")
        self.logarithms = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(v)), requires_grad=name in learn) for name, v in values.items()}
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.logarithms[name].exp()

    def learned(self) -> dict[str, Tensor]:
        """The values that are learned, detached."""
        return {name: log.detach().exp() for name, log in self.logarithms.items() if log.requires_grad}


class Kernel(KeepsArguments, nn.Module, ABC):
    """A positive semi-definite similarity of two examples."""

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities `[tasks, n, m]` of features `a` `[tasks, n, d]` to features `b` `[tasks, m, d]`."""

    def features(self, a: Tensor) -> Tensor | None:
        """Features `[tasks, n, p]` whose inner products are the similarities; None: they would be infinitely many."""
        return None

    def variance(self, a: Tensor) -> Tensor:
        """The similarity `[tasks, n]` of each example to itself, for features `a` `[tasks, n, d]`."""
        alone = a.flatten(0, 1).unsqueeze(1)
        return self(alone, alone).view(a.shape[:2])

    def learned(self) -> dict[str, Tensor]:
        """The numbers that are learned, detached, to be reported."""
        return {k: v for part in self.modules() if isinstance(part, Positive) for k, v in part.learned().items()}


class LinearKernel(Kernel):
    """`<a, b> + constant`: a model that is linear in the features.

    Args:
        constant: the square of a feature that all examples have in common, which gives each output an offset; the
            regulariser holds it small like any other weight. 0 leaves it out.

    >>> LinearKernel()(torch.ones(1, 2, 3), torch.ones(1, 1, 3)).flatten()
    tensor([3., 3.])
    """

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = at_least("constant", constant, 0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT + self.constant

    def features(self, a: Tensor) -> Tensor:
        return with_constant(a, self.constant)


class RBFKernel(Kernel):
    """`exp(-gamma |a - b|^2 / d)`, with the mean squared difference of `d` features, so that `gamma` fits any width.

    Args:
        gamma: how fast similarity falls with distance; 1 is scikit-learn's `gamma="auto"`.
        learn: whether the outer loop learns `gamma`, from there on, through its logarithm.

    >>> RBFKernel(gamma=2.0)(torch.ones(1, 1, 3), torch.zeros(1, 1, 3)).log()
    tensor([[[-2.]]], grad_fn=<LogBackward0>)
    """

    def __init__(self, gamma: float = 1.0, *, learn: bool = True) -> None:
        super().__init__()
        self.positive = Positive({"gamma": gamma}, learn=["gamma"] if learn else [])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (-self.positive["gamma"] * distances_by_products(a, b)).exp()


class MaternKernel(Kernel):
    """The Matern kernel of the distance `r = |a - b| / (sqrt(d) length)`: less smooth than an RBF kernel.

    It is `exp(-r)` for a smoothness of 0.5, `(1 + s) exp(-s)` with `s = sqrt(3) r` for 1.5, and
    `(1 + s + s^2 / 3) exp(-s)` with `s = sqrt(5) r` for 2.5.

    Args:
        smoothness: 0.5, 1.5 or 2.5: functions drawn from such a process have no, one or two derivatives.
        length: over which similarity falls, in units of the root mean square of the features' differences.
        learn: whether the outer loop learns `length`, from there on, through its logarithm.

    Reference: Rasmussen, Williams, Gaussian Processes for Machine Learning, 2006, equation 4.17.

    >>> MaternKernel(smoothness=0.5, learn=False)(torch.ones(1, 1, 3), torch.zeros(1, 1, 3)).log()
    tensor([[[-1.]]])
    """

    def __init__(self, smoothness: float = 2.5, length: float = 1.0, *, learn: bool = True) -> None:
        super().__init__()
        if smoothness not in (0.5, 1.5, 2.5):
            raise InvalidValue("smoothness", smoothness, "must be 0.5, 1.5 or 2.5")
        self.smoothness = smoothness
        self.positive = Positive({"length": length}, learn=["length"] if learn else [])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # Clamped, for the root has no finite derivative at 0.
        squared = squared_distances(a, b) * (2 * self.smoothness)
        s = squared.clamp(min=1e-30).sqrt() / self.positive["length"]
        terms = {0.5: [], 1.5: [s], 2.5: [s, s.square() / 3]}[self.smoothness]
        return sum(terms, torch.ones_like(s)) * (-s).exp()


class CosineKernel(Kernel):
    """The cosine of two features, plus a constant: a model that is linear in features of length 1.

    Args:
        constant: see `LinearKernel`.

    >>> CosineKernel()(torch.ones(1, 1, 4), torch.full((1, 1, 4), 5.0)).item()
    1.0
    """

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = at_least("constant", constant, 0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT + self.constant

    def features(self, a: Tensor) -> Tensor:
        return with_constant(F.normalize(a, dim=-1), self.constant)


def with_constant(a: Tensor, constant: float) -> Tensor:
    """Features `a` `[tasks, n, d]`, and one more with this square that all examples have in common."""
    return F.pad(a, (0, 1), value=math.sqrt(constant)) if constant else a


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared differences `[tasks, n, m]` of features `a` `[tasks, n, d]` and `b` `[tasks, m, d]`."""
    # Exact differences: a kernel that takes the root of a small square would magnify a rounding error.
    return (a.unsqueeze(2) - b.unsqueeze(1)).square().mean(-1)


def distances_by_products(a: Tensor, b: Tensor) -> Tensor:
    """`squared_distances` without all differences `[tasks, n, m, d]`; a distance of 0 may be a rounding error."""
    centre = b.detach().double().mean(1, keepdim=True)  # a common offset would cost digits
    a_centred, b_centred = a.double() - centre, b.double() - centre
    squares = a_centred.square().sum(-1, keepdim=True) + b_centred.square().sum(-1).unsqueeze(1)
    return ((squares - 2 * a_centred @ b_centred.mT) / a.shape[-1]).to(a.dtype)
