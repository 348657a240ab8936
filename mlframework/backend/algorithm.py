"""What the backend needs of an algorithm, as a meta layer has it; its tensors, and its meta-gradient by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mlframework.backend.graph_passes import memory_order
from mlframework.backend.private import buffers_of, parameters_of
from mlframework.episode import Episode, Examples

__all__ = [
    *("Algorithm", "End", "Engine", "GradientFn", "Gradients", "Held", "StepSummary", "eager_gradients", "tensors_of"),
]

#: How a base layer runs over tasks; see `mlframework.backend.engine`.
Engine = Literal["vectorised", "loop"]


class Algorithm(Protocol):
    """An `nn.Module` with a loss to train by."""

    engine: Engine
    outer_step: int  # outer steps taken so far

    @property
    def base_layer(self) -> nn.Module: ...

    def adapt(self, support: Examples) -> Any: ...

    def predict(self, adapted: Any, x: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def mask_or_none(self, mask: Tensor) -> Tensor | None: ...

    def training_loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each task `[tasks]`, to be differentiated, and the metrics, `[tasks]` each."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...


def tensors_of(module: Algorithm) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class Held:
    """Gives the tensors of `tensors_of` as they are now; finding their places anew takes as long as a small step."""

    def __init__(self, module: Algorithm) -> None:
        self.places: list[tuple[Any, str]] = []
        for name in tensors_of(module):
            owner, _, own = name.rpartition(".")
            part = module.get_submodule(owner)
            self.places.append((parameters_of(part) if own in parameters_of(part) else buffers_of(part), own))

    def __call__(self) -> list[Tensor]:
        return [tensors[name] for tensors, name in self.places]


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
    losses, metrics = meta_layer.training_loss(episode)
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
