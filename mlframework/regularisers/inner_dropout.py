"""Dropout of inner gradients: a random share of the parameters adapts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Episode, Params
from mlframework.errors import UserError
from mlframework.inner_loop.inner_update import InnerUpdate, fraction
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.meta_layers.regulariser import LossFn, Regulariser

__all__ = ["InnerDropout"]


class InnerDropout(Regulariser):
    """Drops random numbers of the inner gradients, and scales up the others, so that their mean stays.

    Every outer step draws anew which ones. All tasks and inner steps of it drop the same.

    Args:
        rate: the share that is dropped.

    Reference: Tseng, Chen, Tsai, Liu, Lin, Yang, Regularizing Meta-Learning via Gradient Dropout, 2020,
        arXiv:2004.05859 (Bernoulli noise). Deviation: one draw for all tasks and inner steps of an outer
        step.
    """

    def __init__(self, *, rate: float) -> None:
        super().__init__()
        self.rate = fraction("rate", rate)
        self.names: list[str] = []

    def attach(self, meta_layer: Any) -> None:
        if not (hasattr(meta_layer, "update") and hasattr(meta_layer, "adapted_names")):
            raise UserError(f"is on inner gradients, and {type(meta_layer).__name__} has none: use algorithm=maml")
        self.names = list(meta_layer.adapted_names)
        for number, name in enumerate(self.names):
            kept = torch.ones_like(meta_layer.base_layer.get_parameter(name))
            self.register_buffer(f"kept_{number}", kept, persistent=False)

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        for number in range(len(self.names)):
            kept = self.get_buffer(f"kept_{number}")
            kept.copy_((torch.rand(kept.shape, generator=generator) >= self.rate) / (1 - self.rate))
        return episode

    def meta_loss(self, meta_layer: Any, episode: Episode, loss_of: LossFn) -> tuple[Tensor, Metrics]:
        own = meta_layer.update
        kept = {name: self.get_buffer(f"kept_{number}") for number, name in enumerate(self.names)}
        meta_layer.update = Kept(own, kept)
        try:
            return loss_of(episode)
        finally:
            meta_layer.update = own


class Kept(InnerUpdate):
    """Another rule, on gradients times `kept`, by name."""

    def __init__(self, rule: InnerUpdate, kept: Params) -> None:
        super().__init__()
        self.rule, self.kept = rule, kept

    def init(self, params: Params) -> Any:
        return self.rule.init(params)

    def forward(self, params: Params, grads: Params, state: Any, step: int) -> tuple[Params, Any]:
        return self.rule(params, {name: grad * self.kept[name] for name, grad in grads.items()}, state, step)
