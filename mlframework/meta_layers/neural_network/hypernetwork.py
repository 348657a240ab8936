"""A hypernetwork: reads the support features and emits the weights and the bias of the head."""

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
from mlframework.meta_layers.neural_network.networks import fully_connected, set_mean
from mlframework.meta_layers.neural_network.prototypes import Head, class_means, linear_head
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["EmitsHead", "EmitsRowPerClass", "EmitsRowPerToken", "Hypernetwork"]


class Hypernetwork(FeatureMetaLayer):
    """Emits each task's linear head from its support set, in one forward pass.

    The base layer is the features and the head that is emitted; the meta layer is the network that emits it. A task's
    model is its head.

    In a classification the same network emits every class's row, so that permuted labels permute the rows; it starts as
    the head of prototypical networks. In a regression one network emits the whole head from the mean of encoded
    examples; it starts as one head for all tasks. In a sequence one network emits every token's row, which is added to
    the prior's; it starts as 0. In the literature: weight generation from class means (Gidaris,
    Komodakis; Qiao et al.), to which the sight of the other classes is added here (as in LEO's relation network); the
    start from prototypes is ours.

    Args:
        hidden: width of each hidden layer of the two parts of the meta layer.

    Reference: Ha, Dai, Le, HyperNetworks, 2017, arXiv:1609.09106; Gidaris, Komodakis, Dynamic Few-Shot Visual Learning
        without Forgetting, 2018, arXiv:1804.09458, section 3.2; Qiao et al. 2018, arXiv:1706.03466; Rusu et al. 2019,
        arXiv:1807.05960, section 2.3.
    """

    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self, base_layer: BaseLayer, task: TaskDistribution, *, hidden: Sequence[int] = (128,), **settings: Any
    ) -> None:
        super().__init__(base_layer, task, **settings)
        check_hidden(hidden)
        if task.spec.kind == "classification":
            self.emitter: nn.Module = EmitsRowPerClass(self.feature_size, hidden)
        elif task.spec.kind == "sequence":
            self.emitter = EmitsRowPerToken(self.feature_size, task.spec.out_features, hidden)
        else:
            self.emitter = EmitsHead(self.feature_size, task.spec.out_features, hidden)

    def fit(self, features: Tensor, support: Examples) -> Head:
        # By features [tasks, n, d], targets [tasks, n, out_features] and the mask [tasks, n].
        return self.emitter(features, self.targets(support), support.mask)

    def outputs(self, adapted: Head, features: Tensor) -> Tensor:
        emitted = adapted.logits(features)
        return emitted if self.prior is None else self.prior(features) + emitted


class EmitsRowPerClass(nn.Module):
    """One row of the head per class: that of prototypical networks, and a learned correction.

    The correction to `linear_head` sees the mean of the class's encoded examples and the mean of these over all
    classes; it starts as zero.
    """

    def __init__(self, d: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.encoder = fully_connected(d, hidden, hidden[-1])
        self.correction = fully_connected(2 * hidden[-1], hidden, d + 1, zero=True)

    def forward(self, features: Tensor, targets: Tensor, mask: Tensor) -> Head:
        means = class_means(features, targets)
        encoded = class_means(self.encoder(features), targets)
        others = encoded.mean(1, keepdim=True).expand_as(encoded)
        correction = self.correction(torch.cat([encoded, others], dim=-1))
        weight, bias = linear_head(means)
        return Head(weight + correction[..., :-1], bias + correction[..., -1])


class EmitsHead(nn.Module):
    """The whole head from the mean of encoded examples, each a feature with its target."""

    def __init__(self, d: int, out_features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.encoder = fully_connected(d + out_features, hidden, hidden[-1])
        self.correction = fully_connected(hidden[-1], hidden, out_features * (d + 1), zero=True)
        self.start = nn.Linear(d, out_features)

    def forward(self, features: Tensor, targets: Tensor, mask: Tensor) -> Head:
        task = set_mean(self.encoder(torch.cat([features, targets], dim=-1)), mask)
        correction = self.correction(task).unflatten(-1, (self.start.out_features, -1))
        return Head(self.start.weight + correction[..., :-1], self.start.bias + correction[..., -1])


class EmitsRowPerToken(nn.Module):
    """Adds to the row of every token a correction that it reads from the token's support positions.

    The network sees the mean of the token's encoded positions (0 for a token that the support set does not hold), the
    mean over all positions, the logarithm of the token's count, and an embedding of the token; it starts as 0.
    """

    def __init__(self, d: int, vocabulary: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(vocabulary, hidden[-1]))
        self.encoder = fully_connected(d, hidden, hidden[-1])
        self.emitter = fully_connected(3 * hidden[-1] + 1, hidden, d + 1, zero=True)

    def forward(self, features: Tensor, targets: Tensor, mask: Tensor) -> Head:
        encoded = self.encoder(features)
        means = class_means(encoded, targets)
        task = set_mean(encoded, mask).unsqueeze(1).expand_as(means)
        counts = torch.log1p(targets.sum(1)).unsqueeze(-1)
        rows = self.emitter(torch.cat([means, task, counts, self.tokens.expand_as(means)], dim=-1))
        return Head(rows[..., :-1], rows[..., -1])
