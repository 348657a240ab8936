"""LoRA: low-rank changes of linear layers adapt."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import as_base_layer
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.meta_layer import matching, with_settings_of
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["LoRA", "LowRank"]


class LowRank(nn.Module):
    """A linear layer with a change of low rank: `y = W x + b + U D x`, at first `U = 0`."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        like = linear.weight
        # Drawn, not zero: with both zero, neither would ever get a gradient.
        self.down = nn.Parameter(torch.randn(rank, linear.in_features).to(like) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank).to(like))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.down.mT) @ self.up.mT


class LoRA(MAML):
    """MAML over low-rank changes of linear layers; the outer loop learns these layers, and where the changes start.

    A task's own model is a few numbers beside the shared network: what adapts, and what a second-order meta-gradient
    keeps of each inner step, is `rank * (in_features + out_features)` for a layer.

    Args:
        base_layer: is changed: linear layers are replaced by `LowRank` ones around them.
        layers: a regular expression for the names of the linear layers that get a low-rank change.
        rank: of the changes.
        task, settings: see `MAML`.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685, section 4.1.
        Deviations: the outer loop learns `W`, `D` and `U` together, where the paper's `W` is frozen; there is no factor
        alpha / rank beside the inner rate.
    """

    @with_settings_of(MAML, but=["adapts"])
    def __init__(
        self, base_layer: nn.Module, task: TaskDistribution, *, layers: str, rank: int, **settings: Any
    ) -> None:
        at_least("rank", rank, 1)
        base_layer = as_base_layer(base_layer)
        linear = {name: module for name, module in base_layer.named_modules() if isinstance(module, nn.Linear)}
        for name in matching(layers, linear, field="layers", what="linear layer"):
            base_layer.set_submodule(name, LowRank(linear[name], rank))
        super().__init__(base_layer, task, adapts=r"\.(down|up)$", **settings)
