"""Conditional neural processes: encode the examples, average, decode at the query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.mlp import check_hidden
from mlframework.episode import Examples
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.neural_network.networks import fully_connected, pairs, set_mean
from mlframework.meta_layers.neural_network.prototypes import class_means
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ConditionalNeuralProcess"]


class ConditionalNeuralProcess(FeatureMetaLayer):
    """Encodes every example, averages the codes, and decodes query features beside their mean.

    The base layer is the features; the meta layer is the encoder `h` and the decoder `g`. A task's model is the mean
    code, which `outputs` decodes at every query.

    In a regression a code is that of a feature with its target. In a classification examples are averaged class by
    class, as in the paper's Omniglot experiment; but where the paper concatenates the means of all classes, one decoder
    scores each class from its own mean and the mean of all, so that permuted labels permute the scores.

    In a sequence a code is that of a position's feature with the token that followed, and what is decoded is a change
    of the feature, from which the prior then predicts; it starts as none.

    Other deviations: the decoder predicts the mean alone, as the loss is the squared error, and no variance; and
    besides the mean code it is given the query's projected features, not its bare input, and their product with the
    code, by which it learns to compare much faster.

    Args:
        hidden: width of each hidden layer of the encoder and of the decoder; the last is also the size of a code.

    Reference: Garnelo et al., Conditional Neural Processes, 2018, arXiv:1807.01613, equations 1 to 3 and section 4.3.
    """

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self, base_layer: BaseLayer, task: TaskDistribution, *, hidden: Sequence[int] = (128, 128), **settings: Any
    ) -> None:
        super().__init__(base_layer, task, **settings)
        check_hidden(hidden)
        d, code, out = self.feature_size, hidden[-1], task.spec.out_features
        self.by_class = task.spec.kind == "classification"
        self.encoder = fully_connected(d if self.by_class else d + out, hidden, code)
        self.query = nn.Linear(d, code)
        if self.prior is None:
            self.decoder = fully_connected(4 * code, hidden, 1 if self.by_class else out)
        else:
            self.decoder = fully_connected(4 * code, hidden, d, zero=True)

    def fit(self, features: Tensor, support: Examples) -> Tensor:
        """The mean code of each class `[tasks, classes, code]`; a regression and a sequence have one class."""
        targets = self.targets(support)
        if self.by_class:
            return class_means(self.encoder(features), targets)
        return set_mean(self.encoder(torch.cat([features, targets], dim=-1)), support.mask).unsqueeze(1)

    def outputs(self, adapted: Tensor, features: Tensor) -> Tensor:
        query = self.query(features)
        products = query.unsqueeze(2) * adapted.unsqueeze(1)
        context = adapted.mean(1, keepdim=True).expand_as(adapted)
        seen = pairs(query, torch.cat([adapted, context], dim=-1))
        decoded = self.decoder(torch.cat([seen, products], dim=-1)).flatten(2)
        return decoded if self.prior is None else self.prior(features + decoded)
