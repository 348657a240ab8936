"""Early stopping of the inner loop, task by task."""

from __future__ import annotations

from torch import Tensor

from mlframework.episode import Examples, Params
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.inner_losses import SupportLoss
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["StoppedLoss"]


class StoppedLoss(SupportLoss):
    """The support loss while it is above a limit; below, 0, so that the task adapts no further.

    Each task stops by itself, in training and at test, and the meta-gradient is exact but at the limit. An update rule
    with momentum goes on by what it remembers, and weight decay goes on as well.

    Args:
        limit: the support loss below which a task stops.
    """

    is_mean = False  # whether a task stops depends on the loss of all its examples

    def __init__(self, task: TaskDistribution, limit: float) -> None:
        super().__init__(task)
        self.limit = at_least("limit", limit, 0)

    def forward(self, prediction: Tensor, support: Examples, params: Params, step: int) -> Tensor:
        losses = super().forward(prediction, support, params, step)
        return losses * (losses.detach() > self.limit)
