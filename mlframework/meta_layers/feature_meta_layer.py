"""Meta layers that work on features: each task's own model replaces the base layer's head."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from mlframework.backend.forward import region
from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Episode, Examples
from mlframework.meta_layers.meta_layer import Adapted, BatchNormPolicy, MetaLayer, Metrics, require_features
from mlframework.meta_layers.predictive import Predictive
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FeatureMetaLayer"]


class FeatureMetaLayer(MetaLayer):
    """Fits a task's model to its support features, in one go, and applies it to query features.

    A subclass implements `fit` and `outputs`, both batched over tasks. All tasks share the base layer's features, which
    the outer loop learns. The head is dropped, except for sequences.

    In a sequence every position is an example: its feature, with the next token as its class. A few positions show only
    a few of all tokens, so the base layer's head stays as the `prior` that all tasks share. A task's model corrects it.

    Args:
        base_layer: only its `features` are kept.
        task, frozen: see `MetaLayer`.
        batch_norm: see `MetaLayer`; by default the support set's statistics normalise the queries.
    """

    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "support",
    ) -> None:
        require_features(base_layer, type(self).__name__)
        super().__init__(BaseLayer(base_layer.features, nn.Identity()), task, frozen=frozen, batch_norm=batch_norm)
        self.prior = base_layer.head if task.spec.kind == "sequence" else None
        device = next(base_layer.parameters(), torch.empty(0)).device
        with torch.no_grad():
            self.feature_size = base_layer.features(task.spec.zeros(2, device)).shape[-1]

    @abstractmethod
    def fit(self, features: Tensor, support: Examples) -> Adapted:
        """Each task's model, from support features `[tasks, n, d]`; in a sequence `n` are all positions of all rows.

        Each leaf of `support` is `[tasks, n, ...]`; examples with mask 0 must not count.
        """

    @abstractmethod
    def outputs(self, adapted: Adapted, features: Tensor) -> Tensor:
        """Predictions `[tasks, n, out_features]` of each task's model for features `[tasks, n, d]`."""

    def distribution(self, adapted: Adapted, features: Tensor) -> Predictive:
        """The predictive distribution for features `[tasks, n, d]`, with a variance if the algorithm states one."""
        return Predictive(self.outputs(adapted, features))

    def adapt(self, support: Examples) -> Adapted:
        features = self.features_of(support.x, self.mask_or_none(support.mask))
        if self.prior is None:
            return self.fit(features, support)
        return self.fit(features.flatten(1, 2), Examples(*(leaf.flatten(1) for leaf in support)))

    def predict(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Tensor:
        features = self.features_of(x, mask)
        return self.outputs(adapted, features.flatten(1, -2)).unflatten(1, features.shape[1:-1])

    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive:
        features = self.features_of(x, mask)
        prediction, variance = self.distribution(adapted, features.flatten(1, -2))
        prediction = prediction.unflatten(1, features.shape[1:-1])
        return Predictive(prediction, None if variance is None else variance.view_as(prediction))

    def adapted_features(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.features_of(x, mask)

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Metrics]:
        """Support and query share one pass through the features if neither changes the other's."""
        if self.prior is not None or (self.base_layer.mixes_examples and self.batch_norm != "support"):
            return super().meta_loss(episode)
        of_support, of_query = self.features_of_both(episode)
        adapted = self.fit(of_support, episode.support)
        metrics = self.metrics_of(adapted, self.distribution(adapted, of_query), episode.query)
        return metrics[self.minimised], metrics

    def features_of_both(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Features of the support set and of the query set, each `[tasks, n, d]`.

        If examples mix, the support set's statistics normalise all of them.
        """
        (support, query), mixes = episode, self.base_layer.mixes_examples
        if self.support_chunk is not None:  # both in one pass would need a copy of a large support set
            of_support, of_query = (self.features_of(part.x, self.mask_or_none(part.mask)) for part in episode)
            return of_support, of_query
        both = episode.joined()
        mask = torch.cat([support.mask, torch.zeros_like(query.mask)], dim=1) if mixes else self.mask_or_none(both.mask)
        of_support, of_query = self.features_of(both.x, mask).split([support.x.shape[1], query.x.shape[1]], dim=1)
        return of_support, of_query

    def features_of(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features `[tasks, n, d]` of inputs `[tasks, n, *x_shape]`; of sequences `[tasks, n, length, d]`."""
        # Once per step: computing them anew in the backward pass would make that twice as slow.
        return self.in_parts(partial(region(self.call_base_layer, recompute=False), {}), x, mask)
