"""Whether the scales and shifts of batch norms are one set, or one for every inner step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from torch import nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.normalisation import BatchStatistics
from mlframework.episode import Params
from mlframework.inner_loop.inner_update import at_least

__all__ = ["NormWeights", "PerStepNorm", "SharedNorm"]

log = logging.getLogger(__name__)


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

    def forward(self, step: int, num_tasks: int) -> Params:
        chosen = (weight[min(step, self.steps - 1)] for weight in self.weights)
        return {name: p.expand(num_tasks, *p.shape) for name, p in zip(self.names, chosen, strict=True)}
