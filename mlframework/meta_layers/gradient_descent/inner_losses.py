"""What the inner loop descends: the support loss, or a loss of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mlframework.episode import Examples, Params, masked_mean
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["InnerLoss", "SupportLoss"]


class InnerLoss(nn.Module, ABC):
    """Each task's inner loss. Its own parameters, if it has any, are learned by the outer loop.

    A learned loss, a loss that differs from task to task, and a term beside the support loss are each a subclass:

    >>> class Decayed(SupportLoss):
    ...     def forward(self, prediction, support, params, step):
    ...         decay = sum(p.flatten(1).square().sum(1) for p in params.values())
    ...         return super().forward(prediction, support, params, step) + 0.01 * decay

    Args:
        task: says what the loss is.
    """

    def __init__(self, task: TaskDistribution) -> None:
        super().__init__()
        self.task = task

    @abstractmethod
    def forward(self, prediction: Tensor, support: Examples, params: Params, step: int) -> Tensor:
        """The loss of each task `[tasks]`.

        Args:
            prediction: `[tasks, n, out_features]`; of sequences `[tasks, n, length, out_features]`.
            support: each leaf `[tasks, n, ...]`; examples with mask 0 must not count.
            params: each task's adapted parameters, `[tasks, *shape]`, with which the prediction was made.
            step: 0 at the first step.
        """

    def mean(self, losses: Tensor, support: Examples) -> Tensor:
        """The mean `[tasks]` of losses `[tasks, n, ...]` over the examples that count."""
        return masked_mean(losses, support.mask if self.task.spec.ragged else None)


class SupportLoss(InnerLoss):
    """The task's own loss on the support set (arXiv:1703.03400, algorithm 1)."""

    def forward(self, prediction: Tensor, support: Examples, params: Params, step: int) -> Tensor:
        return self.mean(self.task.loss(prediction, support.y), support)
