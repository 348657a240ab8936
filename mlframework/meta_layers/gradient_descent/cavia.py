"""CAVIA: a context of each task adapts, and modulates a network that all tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer, Stack, as_base_layer
from mlframework.base_layers.check_base_layer import recorded_calls
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue, nearest
from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["CAVIA", "FiLM", "Modulation", "Shift"]


class Modulation(KeepsArguments, nn.Module, ABC):
    """Lets a context act on the output of the module before it; the initial context, zero, changes nothing.

    Args:
        context_size: numbers in the context.
        channels: of the input: axis 1 of images `[n, channels, height, width]`, else the last axis.
    """

    def __init__(self, context_size: int, channels: int) -> None:
        super().__init__()
        # Drawn, not zero: with both zero, neither would ever get a gradient.
        self.map = nn.Linear(context_size, channels * self.numbers_per_channel, bias=False)
        self.context = nn.Parameter(torch.zeros(context_size))

    #: Numbers per channel that the context emits.
    numbers_per_channel: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`x`, modulated by the context."""

    def emitted(self, x: Tensor) -> tuple[Tensor, ...]:
        """The numbers per channel, each shaped to go with `x`."""
        numbers = self.map(self.context).chunk(self.numbers_per_channel)
        return tuple(number.view(-1, 1, 1) if x.dim() == 4 else number for number in numbers)


class Shift(Modulation):
    """Adds a linear map of the context.

    After the first linear layer it is the context concatenated to the input (arXiv:1810.03642, section 3.2).
    """

    numbers_per_channel = 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.emitted(x)[0]


class FiLM(Modulation):
    """Scales and shifts every channel by linear maps of the context.

    Reference: Perez et al., FiLM, 2018, arXiv:1709.07871, as in arXiv:1810.03642, section 3.2. Deviation: the scale is
        1 plus its map, and maps have no offset, so that without a context the network is as it was.
    """

    numbers_per_channel = 2

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.emitted(x)
        return x * (1 + scale) + shift


class CAVIA(MAML):
    """Adapts a context from zero, and nothing else; the outer loop learns the network and how the context modulates it.

    A task is a few numbers, which can hardly overfit.

    Args:
        base_layer: is changed: the modulation is put behind the module that `modulates` names.
        modulates: name of a module in the base layer, as in `features.1`; the number says which among its siblings,
            where they have names of their own.
        modulation: `Shift` or `FiLM`.
        context_size: numbers in the context.
        task, settings: see `MAML`.

    Reference: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, Fast Context Adaptation via Meta-Learning, 2019,
        arXiv:1810.03642, section 3 and algorithm 1.
    """

    @with_settings_of(MAML, but=["adapts"])
    def __init__(
        self,
        base_layer: nn.Module,
        task: TaskDistribution,
        *,
        modulates: str,
        modulation: Callable[[int, int], Modulation],
        context_size: int,
        **settings: Any,
    ) -> None:
        at_least("context_size", context_size, 1)
        base_layer = as_base_layer(base_layer)
        modulates = by_number(base_layer, modulates)
        channels = channels_behind(base_layer, modulates, task.spec)
        modulated = modulation(context_size, channels).to(next(base_layer.parameters()))
        base_layer.set_submodule(modulates, Stack(base_layer.get_submodule(modulates), modulated))
        super().__init__(base_layer, task, adapts=r"\.context$", **settings)
        # It adapts, but where it starts is not learned.
        modulated.context.requires_grad_(False)


def by_number(base_layer: BaseLayer, name: str) -> str:
    """The name of a module in the base layer that is called by its number among its siblings; else the name itself."""
    parent, _, number = name.rpartition(".")
    modules = dict(base_layer.named_modules())
    if name in modules or parent not in modules or not number.isdecimal():
        return name
    siblings = [child for child, _ in modules[parent].named_children()]
    return f"{parent}.{siblings[int(number)]}" if int(number) < len(siblings) else name


def channels_behind(base_layer: BaseLayer, name: str, spec: TaskSpec) -> int:
    """How many channels a module puts out, by asking for those of two inputs of zeros."""
    modules = dict(base_layer.named_modules())
    modules.pop("")
    if name not in modules:
        why = f"names no module{nearest(name, modules)}; there are {', '.join(modules)}"
        raise InvalidValue("modulates", name, why)
    with torch.no_grad(), recorded_calls(base_layer) as calls:
        base_layer(spec.zeros(2, next(base_layer.parameters()).device))
    outputs = [call.output for call in calls if call.name == name]
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        raise InvalidValue("modulates", name, "must be a module that is called once, and puts out one tensor")
    return outputs[0].shape[1 if outputs[0].dim() == 4 else -1]
