"""An inner loss that is itself a small network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlframework.episode import Examples, Params
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.inner_losses import SupportLoss
from mlframework.meta_layers.neural_network.networks import check_hidden, fully_connected
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["LearnedLoss"]


class LearnedLoss(SupportLoss):
    """A network reads an example's prediction and target, and says what the prediction costs; the outer loop learns it.

    The inner loss is the mean of these costs, plus the support loss times a weight. The network's last layer starts at
    zero, so that the first inner steps are those on the weighted support loss.

    Args:
        task: says what the support loss is, and how wide predictions are.
        hidden: width of each hidden layer.
        support_weight: of the support loss; 0 leaves the network alone, as in the paper.

    Reference: Bechtle et al., Meta-Learning via Learned Loss, 2021, arXiv:1906.05374, section 3.1 and algorithm 1.
        Deviations: the support loss beside the network, and its start at zero; the initialisation of the base layer is
        learned as well, as in MAML.
    """

    def __init__(self, task: TaskDistribution, hidden: Sequence[int] = (40, 40), support_weight: float = 1.0) -> None:
        super().__init__(task)
        check_hidden(hidden)
        self.support_weight = at_least("support_weight", support_weight, 0)
        self.network = fully_connected(2 * task.spec.out_features, hidden, 1, zero=True)

    def forward(self, prediction: Tensor, support: Examples, params: Params, step: int) -> Tensor:
        target = support.y
        if self.task.spec.kind != "regression":
            target = F.one_hot(target, self.task.spec.out_features).to(prediction)
        cost = F.softplus(self.network(torch.cat([prediction, target], dim=-1))).squeeze(-1)
        own = self.mean(cost, support)
        if not self.support_weight:
            return own
        return own + self.support_weight * super().forward(prediction, support, params, step)
