"""The ways from an inner loop to a meta-gradient."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlframework.episode import Episode
from mlframework.errors import InvalidValue

if TYPE_CHECKING:
    from mlframework.meta_layers.gradient_descent.maml import MAML
    from mlframework.meta_layers.meta_layer import Metrics

__all__ = ["Exact", "FirstOrder", "MetaGradient", "ParameterDifference"]


class MetaGradient(ABC):
    """How the query loss is differentiated through the inner loop."""

    #: Whether the gradient of the meta-loss is that of the query loss, exactly.
    exact: bool
    #: Whether the inner gradients can be differentiated again.
    create_graph: bool

    def meta_loss(self, layer: MAML, episode: Episode) -> tuple[Tensor, Metrics]:
        """What the outer loop differentiates `[tasks]`, and what it reports."""
        metrics = layer.judge(layer.adapt(episode.support), episode)
        return metrics["query_loss"], metrics


class Exact(MetaGradient):
    """Differentiates through every inner step, second derivatives included (arXiv:1703.03400, algorithm 1)."""

    exact = True
    create_graph = True


class FirstOrder(MetaGradient):
    """Takes the inner gradients for constants (FOMAML; arXiv:1703.03400, section 5.2)."""

    exact = False
    create_graph = False


class ParameterDifference(MetaGradient):
    """Reptile: the meta-gradient is the way that inner training went, initial minus trained parameters.

    Inner training uses all the examples of an episode, support and query, in minibatches that go round in the order in
    which the rows stand; the reported query loss is therefore one of examples that were trained on.

    Args:
        batch_size: examples per inner step; None takes them all.

    Reference: Nichol, Achiam, Schulman, On First-Order Meta-Learning Algorithms, 2018, arXiv:1803.02999, algorithm 2.
    """

    exact = False
    create_graph = False

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise InvalidValue("batch_size", batch_size, "must be at least 1, or null for all examples")
        self.batch_size = batch_size

    def meta_loss(self, layer: MAML, episode: Episode) -> tuple[Tensor, Metrics]:
        # The gradient of <initial, constant> is the constant; the query loss gives no gradient of its own.
        examples = episode.joined()
        initial = layer.initial(examples)
        with torch.no_grad():
            *_, trained = layer.trajectory(examples, layer.inner_steps, batch_size=self.batch_size)
            metrics = layer.judge(trained, episode)
        surrogate = sum((p.flatten(1) * (p - trained[name]).detach().flatten(1)).sum(1) for name, p in initial.items())
        assert isinstance(surrogate, Tensor)
        return surrogate, metrics
