"""TAML: a start that is no better for some tasks than for others."""

from __future__ import annotations

import torch
from torch import Tensor

from mlframework.episode import Episode
from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.meta_layers.regulariser import LossFn, Regulariser

__all__ = ["Inequality", "gini", "theil", "variance_of_logarithms"]


def theil(losses: Tensor) -> Tensor:
    """Theil's index of losses `[tasks]` above 0: the mean of `r log r`, `r` being a loss over the mean loss."""
    ratio = losses / losses.mean()
    return torch.special.xlogy(ratio, ratio).mean()


def gini(losses: Tensor) -> Tensor:
    """Gini's coefficient of losses `[tasks]`: half the mean absolute difference of two, over the mean."""
    return (losses[:, None] - losses).abs().mean() / (2 * losses.mean())


def variance_of_logarithms(losses: Tensor) -> Tensor:
    """The mean squared distance of the logarithms of losses `[tasks]` above 0 from their mean."""
    return losses.log().var(unbiased=False)


MEASURES = {"theil": theil, "gini": gini, "variance_of_logarithms": variance_of_logarithms}


class Inequality(Regulariser):
    """Adds `weight` times the inequality over tasks of the query losses before adaptation.

    The measure is over the tasks that a meta-gradient takes at once: with `outer.chunk`, over each chunk.

    Args:
        weight: of the inequality (lambda).
        measure: `theil`, `gini` or `variance_of_logarithms`.

    Reference: Jamal, Qi, Task Agnostic Meta-Learning for Few-Shot Learning, 2019, arXiv:1805.07722
        (inequality-minimising TAML). Deviation: the losses before adaptation are those of the query set.
    """

    compares_tasks = True

    def __init__(self, *, weight: float, measure: str) -> None:
        super().__init__()
        self.weight = at_least("weight", weight, 0)
        if measure not in MEASURES:
            raise InvalidValue("measure", measure, f"must be one of {', '.join(MEASURES)}{nearest(measure, MEASURES)}")
        self.measure = measure

    def attach(self, meta_layer: MetaLayer) -> None:
        if not meta_layer.test_inner_steps:
            raise UserError(f"is on losses before adaptation, and {type(meta_layer).__name__} has no inner steps")

    def meta_loss(self, meta_layer: MetaLayer, episode: Episode, loss_of: LossFn) -> tuple[Tensor, Metrics]:
        losses, metrics = loss_of(episode)
        initial = next(iter(meta_layer.trajectory(episode.support, 0)))
        before = meta_layer.query_metrics(initial, episode)["query_loss"]
        return losses + self.weight * MEASURES[self.measure](before), metrics
