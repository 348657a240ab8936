"""What every base layer is: features, then a head, written for the examples of one task."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mlframework.files import KeepsArguments

__all__ = ["BaseLayer", "Composed", "MixesExamples", "Run", "Stack", "TakesMask"]

#: Calls the part of a module that has a name.
Run = Callable[[str, Tensor], Tensor]


class TakesMask(nn.Module):
    """A module that is told which examples count: `forward(x, mask)`."""


class Stack(nn.Sequential, TakesMask):
    """A sequence of modules that hands the mask to those that take it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for module in self:
            x = call(module, x, mask)
        return x


class Composed(TakesMask):
    """A module whose parameters all belong to its parts, and which says how these are run, one task's or many's.

    So that it can be run on parameters of each task without vmap; see `mlframework.backend.stacked`.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.through(lambda name, x: call(getattr(self, name), x, mask), x, mask)

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        """What it makes of inputs, which may have an axis of tasks in front.

        Args:
            run: calls a part, by its name.
            x: `[..., n, *x_shape]`.
            mask: `[..., n, *positions]`, which count; None: all.
        """
        raise NotImplementedError


class MixesExamples(TakesMask):
    """A module whose output for one example depends on the others that count."""


#: What is asked of a base layer.
NEEDED = (
    "must be a BaseLayer(features, head): features give [n, d] for inputs [n, *x_shape], the head gives predictions"
)

#: What makes a prediction depend on the examples beside it.
MIXING: tuple[type[nn.Module], ...] = (MixesExamples, nn.modules.batchnorm._BatchNorm)


class BaseLayer(KeepsArguments, nn.Module):
    """An ordinary network in two parts, so that algorithms can adapt, freeze or replace either.

    It is written for one task's examples `[n, *x_shape]`; the engine stacks tasks around it. Parameters are addressed
    by name, and the names start with `features.` and `head.`.

    Args:
        features: inputs `[n, *x_shape]` to features `[n, d]`.
        head: features `[n, d]` to predictions `[n, out_features]`.

    >>> import torch
    >>> BaseLayer(nn.Flatten(), nn.Linear(4, 2))(torch.zeros(3, 2, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    @property
    def mixes_examples(self) -> bool:
        """Whether an example's prediction depends on the examples beside it, as with batch statistics."""
        return any(isinstance(module, MIXING) for module in self.modules())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predictions `[n, out_features]` for inputs `[n, *x_shape]`; `mask` `[n]`: which rows count (None: all)."""
        return call(self.head, call(self.features, x, mask), mask)


def call(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Calls a module, with the mask if it takes one."""
    return module(x, mask) if isinstance(module, TakesMask) else module(x)
