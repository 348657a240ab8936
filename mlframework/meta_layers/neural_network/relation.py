"""Relation network: a network compares each query with the mean of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.mlp import check_hidden
from mlframework.episode import Examples
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.neural_network.networks import fully_connected, pairs
from mlframework.meta_layers.neural_network.prototypes import class_means
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["RelationNetwork"]


class RelationNetwork(FeatureMetaLayer):
    """Scores a query against each class by a network that compares their features.

    The base layer is the embedding network; the meta layer is the comparator, the paper's relation module. A task's
    model is one mean feature per class, with which `outputs` compares every query.

    Deviations: features are vectors, so the comparator is fully connected where the paper's convolves the two feature
    maps; scores go into the task's loss, not by squared error after a sigmoid; a class is the mean of its
    features, not their sum, so that the number of shots may vary.

    Args:
        hidden: width of each hidden layer of the comparator.

    Reference: Sung et al., Learning to Compare: Relation Network for Few-Shot Learning, 2018, arXiv:1711.06025, section
        3 and equation 1.
    """

    kinds = ("classification",)
    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self, base_layer: BaseLayer, task: TaskDistribution, *, hidden: Sequence[int] = (128, 128), **settings: Any
    ) -> None:
        super().__init__(base_layer, task, **settings)
        check_hidden(hidden)
        self.comparator = fully_connected(2 * self.feature_size, hidden, 1)

    def fit(self, features: Tensor, support: Examples) -> Tensor:
        return class_means(features, self.targets(support))  # [tasks, classes, d]

    def outputs(self, adapted: Tensor, features: Tensor) -> Tensor:
        return self.comparator(pairs(features, adapted)).squeeze(-1)
