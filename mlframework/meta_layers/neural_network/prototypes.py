"""Prototypical networks: a class is the mean of its support features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.meta_layers.meta_layer import BatchNormPolicy
from mlframework.meta_layers.on_features import OnFeatures
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Prototypes", "class_means", "linear_head"]


class Prototypes(OnFeatures):
    """Classifies a query by its distance to the mean support feature of each class.

    The base layer is the embedding network; the meta layer is the mean, which has nothing to learn but, for cosines,
    their scale. The family's loop: `__init__` initialises; the trainer draws episodes; `features_of` gives base
    features; `fit` learns the task's model, one prototype per class; `outputs` predicts on unseen data; the outer loop
    turns the error into a gradient and an update of the embedding.

    Args:
        base_layer, task, frozen, batch_norm: see `OnFeatures`.
        distance: `euclidean` (logits are negative squared distances) or `cosine` (scaled cosine similarities).
        scale: of the cosines, where its learning starts; Euclidean distances have none.

    Reference: Snell, Swersky, Zemel, Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175, equations 1
        and 2. Cosine with a learned scale: Gidaris, Komodakis 2018, arXiv:1804.09458, equation 2.
    """

    kinds = ("classification",)

    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        distance: str = "euclidean",
        scale: float = 10.0,
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "support",
    ) -> None:
        super().__init__(base_layer, task, frozen=frozen, batch_norm=batch_norm)
        if distance not in ("euclidean", "cosine"):
            raise InvalidValue("distance", distance, "must be euclidean or cosine")
        if not scale > 0:
            raise InvalidValue("scale", scale, "must be above 0")
        self.scale = nn.Parameter(torch.tensor(float(scale))) if distance == "cosine" else None

    def fit(self, features: Tensor, support: Examples) -> Tensor:
        """The prototypes `[tasks, classes, d]`."""
        return class_means(features, self.targets(support))

    def outputs(self, adapted: Tensor, features: Tensor) -> Tensor:
        if self.scale is None:
            # The squared distances one by one: |a|^2 - 2ab + |b|^2 would cancel in float32.
            return -(features.unsqueeze(2) - adapted.unsqueeze(1)).square().sum(-1)
        return self.scale * F.normalize(features, dim=-1) @ F.normalize(adapted, dim=-1).mT


def class_means(features: Tensor, targets: Tensor) -> Tensor:
    """The mean of each class's features.

    Args:
        features: `[tasks, n, d]`.
        targets: one-hot `[tasks, n, classes]`, 0 in rows that do not count.

    Returns:
        `[tasks, classes, d]`; 0 for a class without examples.
    """
    return (targets.mT @ features) / targets.sum(1).clamp(min=1).unsqueeze(-1)


def linear_head(means: Tensor) -> tuple[Tensor, Tensor]:
    """The weight `[tasks, classes, d]` and the bias `[tasks, classes]` whose logits are those of squared distances.

    With `c` a mean they are `2 c` and `-|c|^2`; what is left out, `-|x|^2`, all classes share (Snell et al. 2017,
    arXiv:1703.05175, equation 8).
    """
    return 2 * means, -means.square().sum(-1)
