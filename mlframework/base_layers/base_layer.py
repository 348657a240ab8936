"""Base layers: features, then a head, written for the examples of one task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from mlframework.backend.forward import runs_in_turn, runs_parts
from mlframework.errors import InvalidValue
from mlframework.files import KeepsArguments

__all__ = [
    *("BATCH_NORMS", "BaseLayer", "Composed", "InEvaluation", "MixesExamples", "PlainLayer"),
    *("Run", "Stack", "TakesMask", "as_base_layer", "mixing_parts", "unfrozen"),
]

#: Calls the part of a module that has a name.
Run = Callable[[str, Tensor], Tensor]

#: Torch's batch norms.
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class TakesMask(nn.Module):
    """A module that is told which examples count: `forward(x, mask)`."""


class MixesExamples(TakesMask):
    """A module whose output for one example depends on the others that count."""


class Composed(TakesMask):
    """A module whose parameters all belong to its parts, and that says how these are run, for one task or for many.

    The backend then runs it with each task's parameters without vmap.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.through(lambda name, x: call(getattr(self, name), x, mask), x, mask)

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        """The output for inputs `[..., n, *x_shape]` that may have an axis of tasks in front.

        `run` calls a part, by its name, with the mask `[..., n, *positions]` if it takes one.
        """
        raise NotImplementedError


runs_parts(Composed.forward)


class Stack(nn.Sequential, TakesMask):
    """A sequence of modules that hands the mask to those that take it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for module in self:
            x = call(module, x, mask)
        return x


runs_in_turn(Stack.forward)


#: What makes a prediction depend on the examples beside it.
MIXING: tuple[type[nn.Module], ...] = (MixesExamples, *BATCH_NORMS)


class InEvaluation(nn.Module):
    """A network that stays in evaluation mode: its batch norms keep the running statistics that it was trained with.

    Nothing writes to these statistics, so no task sees another. Parameters may learn, unless they are `frozen`.
    """

    def __init__(self, network: nn.Module, *, frozen: bool) -> None:
        super().__init__()
        self.network, self.frozen = network.eval(), frozen
        if frozen:
            network.requires_grad_(False)
        self.mixing = [name for name, part in mixing_parts(network) if not keeps_statistics(part)]

    def train(self, mode: bool = True) -> InEvaluation:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def keeps_statistics(norm: nn.Module) -> bool:
    """Whether a norm has running statistics, which normalise in evaluation mode."""
    return isinstance(norm, BATCH_NORMS) and norm.running_mean is not None


def mixing_parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts, by name, that make an example's output depend on the examples beside it."""
    if isinstance(module, InEvaluation):
        inside = ((f"network.{part}".rstrip("."), module.network.get_submodule(part)) for part in module.mixing)
        yield from ((f"{name}.{part}".lstrip("."), found) for part, found in inside)
        return
    if isinstance(module, MIXING):
        yield name, module
    for own, part in module.named_children():
        yield from mixing_parts(part, f"{name}.{own}".lstrip("."))


def unfrozen(base_layer: BaseLayer) -> BaseLayer:
    """Lets every parameter learn, but for those of networks that are frozen as they came."""
    base_layer.requires_grad_()
    for module in base_layer.modules():
        if isinstance(module, InEvaluation) and module.frozen:
            module.requires_grad_(False)
    return base_layer


class BaseLayer(KeepsArguments, Composed):
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
        return next(mixing_parts(self), None) is not None

    @property
    def body(self) -> nn.Module:
        """The network that files of weights know by its own names."""
        return self.features

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        """Predictions `[..., n, out_features]` for inputs `[..., n, *x_shape]`; `mask` `[..., n]`: which rows count."""
        return run("head", run("features", x))


class PlainLayer(BaseLayer):
    """Any module from inputs to predictions as a base layer, for algorithms that need no features of their own.

    The names of its parameters get `features.` in front: the module's `fc.weight` is `features.fc.weight`, which the
    patterns `fc` and `fc.weight$` find, and `^fc` does not.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, nn.Identity())


class MaskedPlainLayer(PlainLayer):
    """A plain module whose `forward(x, mask)` takes the mask, though it is no `TakesMask`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.features(x, mask)


def as_base_layer(module: nn.Module) -> BaseLayer:
    """A module as a base layer: itself, or a `PlainLayer` around it."""
    if isinstance(module, BaseLayer):
        return module
    if not isinstance(module, nn.Module):
        why = "must be a module from inputs [n, *x_shape] to predictions [n, out_features]"
        raise InvalidValue("base_layer", type(module).__name__, why)
    return MaskedPlainLayer(module) if has_mask_argument(module) else PlainLayer(module)


def has_mask_argument(module: nn.Module) -> bool:
    """Whether the second argument of a user's module is called `mask`; torch's own mean something else by it."""
    names = list(inspect.signature(module.forward).parameters)
    return names[1:2] == ["mask"] and not type(module).__module__.startswith("torch.")


def call(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Calls a module, with the mask if it takes one."""
    return module(x, mask) if isinstance(module, TakesMask) else module(x)
