"""The meta-gradient of an episode, as autograd finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.backend.algorithm import Algorithm
from mlframework.backend.graph_passes import memory_order
from mlframework.episode import Episode

__all__ = ["GradientFn", "Gradients", "StepSummary", "eager_gradients"]


class StepSummary(NamedTuple):
    """Scalar tensors that describe a meta-batch, before the optimizer moves anything.

    Attributes:
        norm: of the whole meta-gradient, before clipping.
        total: of losses and norm: finite if all of them are.
        means: of the metrics over tasks.
    """

    norm: Tensor
    total: Tensor
    means: dict[str, Tensor]


class Gradients(NamedTuple):
    """The meta-gradient of an episode.

    Attributes:
        losses: the meta-loss of each task `[tasks]`.
        metrics: `[tasks]` each.
        by_name: for each meta-parameter that took part, the gradient of the *sum* of the losses; with a summary, of
            their mean, clipped.
        summary: of a whole meta-batch.
    """

    losses: Tensor
    metrics: dict[str, Tensor]
    by_name: dict[str, Tensor]
    summary: StepSummary | None = None


#: Finds the meta-gradient of an episode.
GradientFn = Callable[[Algorithm, Episode], Gradients]


def eager_gradients(meta_layer: Algorithm, episode: Episode) -> Gradients:
    """The meta-gradient as autograd finds it; no `.grad` is touched."""
    learned = {name: p for name, p in meta_layer.named_parameters() if p.requires_grad}
    losses, metrics = meta_layer.meta_loss(episode)
    found = torch.autograd.grad(losses, list(learned.values()), torch.ones_like(losses), allow_unused=True)
    by_name = {
        name: laid_out(grad, learned[name]) for name, grad in zip(learned, found, strict=True) if grad is not None
    }
    return Gradients(losses.detach(), {name: value.detach() for name, value in metrics.items()}, by_name)


def laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient with its parameter's strides: fused optimizers walk through both memories side by side."""
    if grad.stride() == parameter.stride():
        return grad
    order, back = memory_order(parameter)
    return grad.permute(order).contiguous().permute(back)
