"""What may differ from inner step to inner step: how much query losses count, and the weights of batch norms."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.normalisation import BatchStatistics
from mlframework.episode import Params
from mlframework.errors import InvalidValue
from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_update import at_least

__all__ = ["LastStep", "MultiStep", "NormWeights", "PerStepNorm", "SharedNorm", "StepWeights"]

log = logging.getLogger(__name__)


class StepWeights(KeepsArguments, ABC):
    """The weights of the query losses after 1, 2, ..., `inner_steps` steps; a loss of weight 0 is not computed."""

    @abstractmethod
    def __call__(self, inner_steps: int, outer_step: int) -> list[float]:
        """`inner_steps` weights that sum to 1, the last of them above 0, at an outer step."""


class LastStep(StepWeights):
    """Only the query loss after the last inner step counts.

    >>> LastStep()(inner_steps=3, outer_step=0)
    [0.0, 0.0, 1.0]
    """

    def __call__(self, inner_steps: int, outer_step: int) -> list[float]:
        return [0.0] * (inner_steps - 1) + [1.0]


class MultiStep(StepWeights):
    """MAML++'s multi-step loss: at first every inner step counts alike, in the end the last one alone.

    With `S` inner steps, at outer step `t` of `T` (`steps`), every step but the last weighs `max(1 - t/T, floor) / S`
    and the last one the rest. From `T` on, only the last one counts.

    Args:
        steps: outer steps until only the last inner step counts.
        floor: least weight of an earlier step until then, as a share of its initial `1/S`.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019, arXiv:1810.09502, section 4 (multi-step loss).
        The paper gives no schedule; this is that of the official code, with its floor of 0.03 and its end. Deviations:
        weights move at every outer step, where the code moves them once per epoch of 500; as in the code, the
        initialisation (step 0) does not count, where the paper's sum begins with it.

    >>> MultiStep(steps=10)(inner_steps=2, outer_step=5)
    [0.25, 0.75]
    """

    def __init__(self, steps: int, floor: float = 0.03) -> None:
        if not 0 <= floor <= 1:
            raise InvalidValue("floor", floor, "must be at least 0 and at most 1")
        self.steps, self.floor = at_least("steps", steps, 1), floor

    def __call__(self, inner_steps: int, outer_step: int) -> list[float]:
        if outer_step >= self.steps:
            return LastStep()(inner_steps, outer_step)
        earlier = max(1 - outer_step / self.steps, self.floor) / inner_steps
        return [earlier] * (inner_steps - 1) + [1 - earlier * (inner_steps - 1)]


class NormWeights(nn.Module, ABC):
    """Parameters of batch norms that stand in for the base layer's own. Its constructor takes the base layer."""

    @abstractmethod
    def forward(self, step: int, num_tasks: int) -> Params:
        """The stacked parameters of inner step `step`, `[tasks, channels]` each, by their names in the base layer."""


class SharedNorm(NormWeights):
    """The base layer's own scales and shifts at every inner step, which adapt as all its parameters."""

    def __init__(self, base_layer: BaseLayer) -> None:
        super().__init__()

    def forward(self, step: int, num_tasks: int) -> Params:
        return {}


class PerStepNorm(NormWeights):
    """MAML++'s per-step batch norms: every inner step has scales and shifts of its own.

    The outer loop learns them; they do not adapt. The base layer's own are their initial values, and are not used.

    Args:
        base_layer: its `BatchStatistics` are meant; without any, one log line says that there is nothing to do.
        steps: how many sets; at later steps the last one stays.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019, arXiv:1810.09502, section 4 (per-step batch
        normalization weights and biases). Deviation: the paper also keeps running statistics per step; examples are
        always normalised by their own statistics here, as they are by the official code.
    """

    def __init__(self, base_layer: BaseLayer, steps: int) -> None:
        super().__init__()
        self.steps = at_least("steps", steps, 1)
        norms = {name: module for name, module in base_layer.named_modules() if isinstance(module, BatchStatistics)}
        own = {f"{norm}.{name}": p for norm, module in norms.items() for name, p in module.named_parameters()}
        if not own:
            log.warning("the base layer has no batch norm: there is nothing to learn per inner step")
        self.names = tuple(own)
        # [steps, channels] each
        self.weights = nn.ParameterList(p.detach().expand(steps, *p.shape).clone() for p in own.values())
        for p in own.values():
            p.requires_grad_(False)

    def learned(self) -> dict[str, Tensor]:
        """Scales and shifts by their names in the base layer, `[steps, channels]` each."""
        return {name: weight.detach() for name, weight in zip(self.names, self.weights, strict=True)}

    def forward(self, step: int, num_tasks: int) -> Params:
        chosen = (weight[min(step, self.steps - 1)] for weight in self.weights)
        return {name: p.expand(num_tasks, *p.shape) for name, p in zip(self.names, chosen, strict=True)}
