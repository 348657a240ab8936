"""Prototypical networks: a class is the mean of its support features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import positive
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Head", "Prototypes", "TokenPrototypes", "class_means", "linear_head"]


class Prototypes(FeatureMetaLayer):
    """Classifies a query by its distance to the mean support feature of each class.

    The base layer is the embedding network; the meta layer is the mean, which has nothing to learn but, for cosines,
    their scale. A task's model is one prototype per class.

    In a sequence a prototype is of a token, the mean feature of the positions that it followed; `TokenPrototypes` says
    how it corrects the prior. That is beyond the paper.

    Args:
        distance: `euclidean` (logits are negative squared distances) or `cosine` (scaled cosine similarities).
        scale: of the cosines, where its learning starts; Euclidean distances have none.

    Reference: Snell, Swersky, Zemel, Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175, equations 1
        and 2. Cosine with a learned scale: Gidaris, Komodakis 2018, arXiv:1804.09458, equation 2.
    """

    kinds = ("classification", "sequence")
    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        distance: str = "euclidean",
        scale: float = 10.0,
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, **settings)
        if distance not in ("euclidean", "cosine"):
            raise InvalidValue("distance", distance, "must be euclidean or cosine")
        positive("scale", scale)
        self.scale = nn.Parameter(torch.tensor(float(scale))) if distance == "cosine" else None
        if task.spec.kind == "sequence":
            self.tokens = TokenPrototypes(self.feature_size, task.spec.out_features)

    def fit(self, features: Tensor, support: Examples) -> Tensor | Head:
        """The prototypes `[tasks, classes, d]`; of sequences, what they add to the prior."""
        targets = self.targets(support)
        if self.prior is None:
            return class_means(features, targets)
        return self.tokens(self.normalised(features), targets, self.normalised)

    def outputs(self, adapted: Tensor | Head, features: Tensor) -> Tensor:
        if isinstance(adapted, Head):
            assert self.prior is not None
            return self.prior(features) + adapted.logits(self.normalised(features))
        if self.scale is None:
            # The squared distances one by one: |a|^2 - 2ab + |b|^2 would cancel in float32.
            return -(features.unsqueeze(2) - adapted.unsqueeze(1)).square().sum(-1)
        return self.scale * F.normalize(features, dim=-1) @ F.normalize(adapted, dim=-1).mT

    def normalised(self, features: Tensor) -> Tensor:
        """Features or prototypes `[..., d]` of length `sqrt(scale)` for cosines, as they are for distances."""
        return features if self.scale is None else self.scale.abs().sqrt() * F.normalize(features, dim=-1)


class Head(NamedTuple):
    """A linear head of each task, or what a task adds to one that all share."""

    weight: Tensor  # [tasks, out_features, d]
    bias: Tensor  # [tasks, out_features]

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.mT + self.bias.unsqueeze(1)  # [tasks, n, out_features]


class TokenPrototypes(nn.Module):
    """Prototypes of tokens, shrunk towards those that all tasks share.

    With `p` a token's shared prototype, `n` its count in the support set and `s` the sum of the features that it
    followed, the task's own is `m = (a p + s) / (a + n)`, and the token's logit changes by
    `c (|x - p|^2 - |x - m|^2) + g log(1 + n / b)`: nothing for a token that the support set does not hold. `p`, the
    pseudo-counts `a` and `b`, and `c` and `g` are learned.
    """

    def __init__(self, d: int, vocabulary: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(vocabulary, d))
        self.log_pseudo_counts = nn.Parameter(torch.zeros(2))
        self.log_closeness = nn.Parameter(torch.tensor(-math.log(d)))
        self.of_frequency = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor, targets: Tensor, normalised: Callable[[Tensor], Tensor]) -> Head:
        """The head that support features `[tasks, n, d]` add to the prior.

        Targets are one-hot `[tasks, n, vocabulary]`, and 0 in rows that do not count. Prototypes go through the map
        `normalised`, as the features did.
        """
        counts = targets.sum(1)
        pseudo, pseudo_of_frequency = self.log_pseudo_counts.exp()
        own = (pseudo * self.shared + targets.mT @ features) / (pseudo + counts).unsqueeze(-1)
        own, shared, closeness = normalised(own), normalised(self.shared), self.log_closeness.exp()
        bias = closeness * (shared.square().sum(-1) - own.square().sum(-1))
        frequency = self.of_frequency * torch.log1p(counts / pseudo_of_frequency)
        return Head(2 * closeness * (own - shared), bias + frequency)


def class_means(features: Tensor, targets: Tensor) -> Tensor:
    """The mean `[tasks, classes, d]` of each class's features `[tasks, n, d]`; 0 for a class without examples.

    Targets are one-hot `[tasks, n, classes]`, and 0 in rows that do not count.
    """
    return (targets.mT @ features) / targets.sum(1).clamp(min=1).unsqueeze(-1)


def linear_head(means: Tensor) -> Head:
    """The weight `[tasks, classes, d]` and the bias `[tasks, classes]` whose logits are those of squared distances.

    With `c` a mean they are `2 c` and `-|c|^2`; what is left out, `-|x|^2`, all classes share (Snell et al. 2017,
    arXiv:1703.05175, equation 8).
    """
    return Head(2 * means, -means.square().sum(-1))
