"""ProtoMAML: the prototypes of a task are where MAML's head starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples, Params
from mlframework.errors import InvalidValue
from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.meta_layer import call_features, require_features, with_settings_of
from mlframework.meta_layers.neural_network.prototypes import class_means, linear_head
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ProtoMAML"]


class ProtoMAML(MAML):
    """MAML whose head starts, in each task, as the prototypical network of its support set.

    With class means c, the head's weights are `2 c` and its biases `-|c|^2`: its logits are minus the squared distances
    to the prototypes, but for `-|x|^2`, which all classes share. From there everything adapts by gradient steps. The
    meta-gradient goes through the prototypes too. The base layer's own head is not used.

    Args:
        base_layer: its head is a linear layer with biases; only that layer's shape matters.
        task, settings: see `MAML`.

    Reference: Triantafillou et al., Meta-Dataset, 2020, arXiv:1903.03096, section 3 (Proto-MAML).
    """

    kinds = ("classification",)
    unread = ("base_layer.head.weight", "base_layer.head.bias")

    @with_settings_of(MAML)
    def __init__(self, base_layer: BaseLayer, task: TaskDistribution, **settings: Any) -> None:
        require_features(base_layer, type(self).__name__)
        super().__init__(base_layer, task, **settings)
        if not isinstance(base_layer.head, nn.Linear) or base_layer.head.bias is None:
            why = "must be a linear layer with biases, for prototypes to start from"
            raise InvalidValue("base_layer", f"{type(base_layer.head).__name__} (head)", why)
        if not {"head.weight", "head.bias"} <= set(self.adapted_names):
            raise InvalidValue("adapts", settings.get("adapts"), "must take in the head, which starts from prototypes")
        base_layer.head.requires_grad_(False)

    @property
    def any_n_way(self) -> bool:  # type: ignore[override]
        """The head comes from the support set; a rule or a loss that learns numbers of its own knows one size."""
        return not [*self.update.parameters(), *self.inner_loss.parameters()]

    def initial(self, support: Examples) -> Params:
        """The initialisation, but for the head, which each task's prototypes give."""
        features = call_features(self, {}, support.x, self.mask_or_none(support.mask))
        weight, bias = linear_head(class_means(features, self.targets(support)))
        return {**super().initial(support), "head.weight": weight, "head.bias": bias}
