"""The meta-gradient of an episode: as autograd finds it, and as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlframework.backend.algorithm import Algorithm, tensors_of
from mlframework.backend.graph_passes import memory_order, merge_products
from mlframework.backend.inductor import compiled
from mlframework.backend.private import swap_tensors, tree_flatten, tree_unflatten
from mlframework.backend.tracing import LATER, changes_with_step, is_same, traced, tracing
from mlframework.episode import Episode, Examples

__all__ = ["End", "GradientFn", "Gradients", "StepSummary", "WholeStep", "eager_gradients"]


class StepSummary(NamedTuple):
    """Scalar tensors that describe a meta-batch, before the optimizer moves anything."""

    norm: Tensor  # of the whole meta-gradient, before clipping
    total: Tensor  # of losses and norm: finite if all of them are
    means: dict[str, Tensor]  # of the metrics over tasks


class Gradients(NamedTuple):
    """The meta-gradient of an episode.

    Attributes:
        by_name: for each meta-parameter that took part, the gradient of the *sum* of the losses; with a summary, of
            their mean, clipped.
    """

    losses: Tensor  # [tasks], the meta-loss of each
    metrics: dict[str, Tensor]  # [tasks] each
    by_name: dict[str, Tensor]
    summary: StepSummary | None = None  # of a whole meta-batch


#: Finds the meta-gradient of an episode.
GradientFn = Callable[[Algorithm, Episode], Gradients]

#: Averages and summarises the gradients of a whole meta-batch.
End = Callable[[Gradients], Gradients]


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


def inputs_of(meta_layer: Algorithm, episode: Episode) -> list[Tensor]:
    return [tensor.detach() for tensor in (*tensors_of(meta_layer).values(), *episode.support, *episode.query)]


class WholeStep:
    """The meta-gradient of a meta layer in training mode as one graph, with its end, for episodes of one shape.

    Raises:
        NotCapturable: the step draws random numbers, or changes with the number of the outer step.
        Exception: whatever tracing and compiling raise.
    """

    def __init__(self, meta_layer: Algorithm, episode: Episode, end: End | None = None) -> None:
        step, inputs = self.flat_step(meta_layer, end), inputs_of(meta_layer, episode)
        with tracing(meta_layer):
            graph = traced(step, inputs)
        with tracing(meta_layer, later=LATER):
            if not is_same(graph, traced(step, inputs)):
                raise changes_with_step(meta_layer)
        merge_products(graph.graph)
        self.compiled = compiled(graph, meta_layer)

    def __call__(self, meta_layer: Algorithm, episode: Episode) -> Gradients:
        with torch.no_grad():
            return tree_unflatten(self.compiled(inputs_of(meta_layer, episode)), self.structure)

    def flat_step(self, meta_layer: Algorithm, end: End | None) -> Callable[..., list[Any]]:
        """A function of tensors to the leaves of the result; notes how they are nested."""
        names = list(tensors_of(meta_layer))
        learned = {name for name, p in meta_layer.named_parameters() if p.requires_grad}

        def step(*inputs: Tensor) -> list[Any]:
            held, data = inputs[: len(names)], inputs[len(names) :]
            tensors = {name: t.detach().requires_grad_(name in learned) for name, t in zip(names, held, strict=True)}
            episode = Episode(Examples(*data[:3]), Examples(*data[3:]))
            with swap_tensors(cast(nn.Module, meta_layer), tensors):
                found = eager_gradients(meta_layer, episode)
            with torch.no_grad():
                leaves, self.structure = tree_flatten(found if end is None else end(found))
            return leaves

        return step
