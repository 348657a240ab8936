"""What the inner loop descends: the support loss, or a loss of its own."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.mlp import check_hidden
from mlframework.episode import Examples, Params, masked_mean
from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.neural_network.networks import fully_connected
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["InnerLoss", "LearnedLoss", "SupportLoss"]

#: Parts of a support set, each with its share of every task's loss.
Parts = Iterator[tuple[Tensor, tuple[Examples]]]


class InnerLoss(nn.Module, ABC):
    """Each task's inner loss. Its own parameters, if it has any, are learned by the outer loop.

    A learned loss, a loss that differs from task to task, and a term beside the support loss are each a subclass:

    >>> class Decayed(SupportLoss):
    ...     def forward(self, prediction, support, params, step):
    ...         decay = sum(p.flatten(1).square().sum(1) for p in params.values())
    ...         return super().forward(prediction, support, params, step) + 0.01 * decay
    """

    #: Whether it is a mean over the examples that count, plus terms without examples: then a large support set can be
    #: gone through in parts.
    is_mean: bool = True

    def __init__(self, task: TaskDistribution) -> None:
        super().__init__()
        self.task = task

    @abstractmethod
    def forward(self, prediction: Tensor, support: Examples, params: Params, step: int) -> Tensor:
        """The loss of each task `[tasks]` at a step, 0 at first; support examples with mask 0 must not count.

        Predictions are `[tasks, n, out_features]`, of sequences `[tasks, n, length, out_features]`, and were made with
        the adapted parameters, `[tasks, *shape]` each.
        """

    def parts(self, size: int | None) -> Callable[[Examples], Parts] | None:
        """Divides a support set into parts of `size` examples, for `inner_loop`; None: all at once.

        Each part comes with its share `[tasks]` of every task's loss.
        """
        if size is not None and not self.is_mean:
            why = f"{type(self).__name__} is no mean over examples, so it needs all of them at once: must be null"
            raise InvalidValue("support_chunk", size, why)
        return None if size is None else functools.partial(divided, size=size, ragged=self.task.spec.ragged)

    def mean(self, losses: Tensor, support: Examples) -> Tensor:
        """The mean `[tasks]` of losses `[tasks, n, ...]` over the examples that count."""
        return masked_mean(losses, support.mask if self.task.spec.ragged else None)


def divided(support: Examples, *, size: int, ragged: bool) -> Parts:
    total = support.counts(ragged=ragged).clamp(min=1)
    return ((part.counts(ragged=ragged) / total, (part,)) for part in support.parts(size))


class SupportLoss(InnerLoss):
    """The task's own loss on the support set (arXiv:1703.03400, algorithm 1)."""

    def forward(self, prediction: Tensor, support: Examples, params: Params, step: int) -> Tensor:
        return self.mean(self.task.loss(prediction, support.y), support)


class LearnedLoss(SupportLoss):
    """A network reads an example's prediction and target, and says what the prediction costs; the outer loop learns it.

    The inner loss is the mean of these costs, plus the support loss times a weight. The network's last layer starts at
    zero, so that the first inner steps are those on the weighted support loss.

    Args:
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
