"""Conditional neural processes: encode the examples, average, decode at the query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.mlp import check_hidden
from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.neural_network.networks import fully_connected, pairs, set_mean
from mlframework.meta_layers.neural_network.prototypes import class_means
from mlframework.meta_layers.predictive import Predictive
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

    With a `least_deviation` a regression has the paper's loss, minus the log probability of the queries: the decoder
    emits a mean and a standard deviation of `least_deviation + (1 - least_deviation) softplus(output)`, as in the
    authors' code with 0.1. Without one, the loss is the squared error, and the decoder emits the mean alone.

    Another deviation: besides the mean code the decoder is given the query's projected features, not its bare input,
    and their product with the code, by which it learns to compare much faster.

    Args:
        hidden: width of each hidden layer of the encoder and of the decoder; the last is also the size of a code.
        least_deviation: of a regression's values, above 0 and below 1; None: no deviation is emitted.

    Reference: Garnelo et al., Conditional Neural Processes, 2018, arXiv:1807.01613, equations 1 to 3 and section 4.3.
    """

    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        hidden: Sequence[int] = (128, 128),
        least_deviation: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, **settings)
        check_hidden(hidden)
        self.least_deviation = checked_deviation(least_deviation, task)
        if least_deviation is not None:
            self.minimised = "query_nll"
        d, code, out = self.feature_size, hidden[-1], task.spec.out_features
        self.by_class = task.spec.kind == "classification"
        self.encoder = fully_connected(d if self.by_class else d + out, hidden, code)
        self.query = nn.Linear(d, code)
        if self.prior is None:
            moments = out if least_deviation is None else 2 * out
            self.decoder = fully_connected(4 * code, hidden, 1 if self.by_class else moments)
        else:
            self.decoder = fully_connected(4 * code, hidden, d, zero=True)

    def fit(self, features: Tensor, support: Examples) -> Tensor:
        """The mean code of each class `[tasks, classes, code]`; a regression and a sequence have one class."""
        targets = self.targets(support)
        if self.by_class:
            return class_means(self.encoder(features), targets)
        return set_mean(self.encoder(torch.cat([features, targets], dim=-1)), support.mask).unsqueeze(1)

    def outputs(self, adapted: Tensor, features: Tensor) -> Tensor:
        return self.distribution(adapted, features).prediction

    def distribution(self, adapted: Tensor, features: Tensor) -> Predictive:
        decoded = self.decoded(adapted, features)
        if self.least_deviation is None:
            return Predictive(decoded if self.prior is None else self.prior(features + decoded))
        mean, spread = decoded.chunk(2, dim=-1)
        deviation = self.least_deviation + (1 - self.least_deviation) * F.softplus(spread)
        return Predictive(mean, deviation.square())

    def decoded(self, adapted: Tensor, features: Tensor) -> Tensor:
        """What the decoder emits for features `[tasks, n, d]`: `[tasks, n, numbers]`."""
        query = self.query(features)
        products = query.unsqueeze(2) * adapted.unsqueeze(1)
        context = adapted.mean(1, keepdim=True).expand_as(adapted)
        seen = pairs(query, torch.cat([adapted, context], dim=-1))
        return self.decoder(torch.cat([seen, products], dim=-1)).flatten(2)


def checked_deviation(deviation: float | None, task: TaskDistribution) -> float | None:
    """The least deviation, if it is one, and the task a regression."""
    if deviation is None:
        return None
    if task.spec.kind != "regression":
        why = f"values have deviations, and {type(task).__name__} is a {task.spec.kind}: leave it null"
        raise InvalidValue("least_deviation", deviation, why)
    if not 0 < deviation < 1:
        raise InvalidValue("least_deviation", deviation, "must be above 0 and below 1, or null")
    return deviation
