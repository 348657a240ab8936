"""The ways from an inner loop to a meta-gradient."""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mlframework.backend.forward import region
from mlframework.episode import Episode, Examples, Params
from mlframework.errors import InvalidValue
from mlframework.files import KeepsArguments
from mlframework.inner_loop.inner_loop import last
from mlframework.inner_loop.inner_update import InnerUpdate, at_least
from mlframework.meta_layers.gradient_descent.per_step import LastStep, StepWeights
from mlframework.meta_layers.meta_layer import Metrics

__all__ = [
    *("AnnealedOrder", "Exact", "FirstOrder", "InnerLearner", "Joint"),
    *("MetaGradient", "ParameterDifference", "Truncated"),
]


class InnerLearner(Protocol):
    """An algorithm with an inner loop, as a `MetaGradient` sees it; `MAML` is one, and documents each member."""

    update: InnerUpdate
    inner_steps: int
    inner_clip: float | None
    inner_weight_decay: float

    def initial(self, support: Examples) -> Params: ...

    def trajectory(self, support: Examples, steps: int, *, batch_size: int | None = None) -> Iterator[Params]: ...

    def inner_losses(self, params: Params, step: int, support: Examples) -> Tensor: ...

    def weights_of_steps(self) -> list[float]: ...

    def query_metrics(self, adapted: Params, episode: Episode) -> Metrics: ...


class MetaGradient(KeepsArguments, ABC):
    """How the query loss is differentiated through the inner loop."""

    #: Whether query losses are differentiated at all, so that it matters how those after each step weigh.
    uses_query_losses: bool = True

    def detached_steps(self, inner_steps: int, outer_step: int) -> int:
        """How many of the first inner steps' gradients are constants, at an outer step; 0: the gradient is exact."""
        return inner_steps

    def trained_steps(self, inner_steps: int) -> int:
        """After how many of the inner steps the trained model predicts."""
        return inner_steps

    def exact(self, inner_steps: int, outer_step: int) -> bool:
        """Whether the gradient of the meta-loss is that of the weighted query losses, exactly."""
        return self.detached_steps(inner_steps, outer_step) == 0

    def weighing(self, step_weights: StepWeights) -> StepWeights:
        """Weights of query losses, refused where there are none to weigh."""
        if not (self.uses_query_losses or isinstance(step_weights, LastStep)):
            why = f"weighs query losses, and {type(self).__name__} takes none: use last"
            raise InvalidValue("step_weights", type(step_weights).__name__, why)
        return step_weights

    def meta_loss(self, layer: InnerLearner, episode: Episode) -> tuple[Tensor, Metrics]:
        """The loss that the outer loop differentiates `[tasks]`, and the metrics it reports."""
        adapted = layer.trajectory(episode.support, layer.inner_steps)
        next(adapted)  # before the first step
        # Evaluated on the way, so that parameters whose loss has no weight are freed.
        evaluated = [
            (weight, region(layer.query_metrics)(params, episode))
            for weight, params in zip(layer.weights_of_steps(), adapted, strict=True)
            if weight
        ]
        # Few operations: of a small step, each is a good part.
        losses = [m["query_loss"] * weight if weight != 1 else m["query_loss"] for weight, m in evaluated]
        return functools.reduce(torch.add, losses), evaluated[-1][1]


class Exact(MetaGradient):
    """Differentiates through every inner step, second derivatives included (arXiv:1703.03400, algorithm 1)."""

    def detached_steps(self, inner_steps: int, outer_step: int) -> int:
        return 0


class FirstOrder(MetaGradient):
    """Treats the inner gradients as constants (FOMAML; arXiv:1703.03400, section 5.2)."""


class Truncated(MetaGradient):
    """Differentiates through the last inner steps exactly, and treats the earlier inner gradients as constants.

    In between `FirstOrder` (0 steps) and `Exact` (all of them) in memory, time and bias.

    Args:
        steps: how many of the last inner steps.

    Reference: Shaban, Cheng, Hatch, Boots, Truncated Back-propagation for Bilevel Optimization, 2019, arXiv:1810.10667,
        section 3. Deviation: the derivative by the initialisation goes on through the earlier steps as in first-order
        MAML (each of them an identity), where truncation would end it.
    """

    def __init__(self, steps: int) -> None:
        self.steps = at_least("steps", steps, 0)

    def detached_steps(self, inner_steps: int, outer_step: int) -> int:
        return max(inner_steps - self.steps, 0)


class AnnealedOrder(MetaGradient):
    """MAML++'s derivative-order annealing: first order in the beginning, exact from then on.

    Args:
        first_order_steps: outer steps before the meta-gradient is exact.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019, arXiv:1810.09502, section 4 (derivative-order
        annealing: first order for the first 50 of 100 epochs; the official settings for Omniglot are exact throughout).
    """

    def __init__(self, first_order_steps: int) -> None:
        self.first_order_steps = at_least("first_order_steps", first_order_steps, 0)

    def detached_steps(self, inner_steps: int, outer_step: int) -> int:
        return inner_steps if outer_step < self.first_order_steps else 0


class ParameterDifference(MetaGradient):
    """Reptile: the meta-gradient is the difference of the initial and the trained parameters.

    Inner training uses all the examples of an episode, support and query, in minibatches that go round in the order in
    which the rows stand; the reported query loss is therefore one of examples that were trained on.

    Args:
        batch_size: examples per inner step; None takes them all.

    Reference: Nichol, Achiam, Schulman, On First-Order Meta-Learning Algorithms, 2018, arXiv:1803.02999, algorithm 2.
    """

    uses_query_losses = False

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise InvalidValue("batch_size", batch_size, "must be at least 1, or null for all examples")
        self.batch_size = batch_size

    def meta_loss(self, layer: InnerLearner, episode: Episode) -> tuple[Tensor, Metrics]:
        # The gradient of <initial, constant> is the constant; the query loss gives no gradient of its own.
        examples = episode.joined()
        initial = layer.initial(examples)
        with torch.no_grad():
            trained = last(layer.trajectory(examples, layer.inner_steps, batch_size=self.batch_size))
            metrics = region(layer.query_metrics)(trained, episode)
        surrogate = sum((p.flatten(1) * (p - trained[name]).detach().flatten(1)).sum(1) for name, p in initial.items())
        assert isinstance(surrogate, Tensor)
        return surrogate, metrics


class Joint(MetaGradient):
    """Conventional learning: the initialisation is trained on the examples of all tasks, as if they were one.

    Nothing adapts while training; at test the inner loop fine-tunes the trained network. This baseline tells what
    learning to adapt is worth ("pretrained" in arXiv:1703.03400, section 5.1). The reported query loss is that of
    support and query together, without adaptation.
    """

    uses_query_losses = False

    def trained_steps(self, inner_steps: int) -> int:
        return 0  # the network that is trained has not adapted

    def exact(self, inner_steps: int, outer_step: int) -> bool:
        return False

    def meta_loss(self, layer: InnerLearner, episode: Episode) -> tuple[Tensor, Metrics]:
        examples = episode.joined()
        metrics = region(layer.query_metrics)(layer.initial(examples), Episode(examples, examples))
        return metrics["query_loss"], metrics
