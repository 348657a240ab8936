"""The interface of predictors: a trained algorithm becomes another one, with settings chosen on validation tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Examples
from mlframework.evaluation.calibration import Answers, predicted_queries
from mlframework.evaluation.part import EvaluationPart
from mlframework.evaluation.task_set import TaskSet
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.meta_layers.predictive import Predictive

__all__ = ["ConstantVariance", "DerivedPredictor", "FittedPredictor", "Wrapped", "with_variance"]


class FittedPredictor(NamedTuple):
    """A predictor at work."""

    meta_layer: MetaLayer
    setting: str  # what validation tasks chose, in words
    #: Its distributions by those of the algorithm, where no more is needed: then no query is predicted again.
    of_distributions: Callable[[Predictive], Predictive] | None = None


class DerivedPredictor(EvaluationPart, ABC):
    """Makes another predictor of a trained algorithm, which stays as it is."""

    @abstractmethod
    def fitted(self, meta_layer: MetaLayer, validation: TaskSet, steps: int) -> FittedPredictor:
        """The predictor, its settings chosen on validation tasks after some inner steps.

        `meta_layer` states a variance if its task is a regression; see `with_variance`.
        """


class Wrapped(MetaLayer):
    """A meta layer around another one, which it leaves as it is: it adapts alike and predicts another distribution."""

    def __init__(self, inner: MetaLayer) -> None:
        super().__init__(inner.base_layer, inner.task, batch_norm=inner.batch_norm)
        self.inner, self.engine = inner, inner.engine
        self.test_inner_steps = inner.test_inner_steps

    def adapt(self, support: Examples) -> Adapted:
        return self.inner.adapt(support)

    def trajectory(self, support: Examples, steps: int) -> Iterator[Adapted]:
        return self.inner.trajectory(support, steps)

    def predict(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.predict_distribution(adapted, x, mask).prediction

    def adapted_features(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner.adapted_features(adapted, x, mask)

    @abstractmethod
    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive: ...


class ConstantVariance(Wrapped):
    """States the same variance `[out_features]` for every query."""

    def __init__(self, inner: MetaLayer, variance: Tensor) -> None:
        super().__init__(inner)
        self.register_buffer("variance", variance)

    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive:
        prediction = self.inner.predict(adapted, x, mask)
        return Predictive(prediction, self.get_buffer("variance").to(prediction).expand_as(prediction))


def with_variance(meta_layer: MetaLayer, validation: TaskSet, steps: int) -> MetaLayer:
    """An algorithm that states a variance if its task is a regression, or the algorithm itself.

    Without a variance of its own it gets the mean squared error of each output on the validation tasks, which is the
    constant variance with the highest likelihood there.
    """
    if meta_layer.task.spec.kind != "regression":
        return meta_layer
    meta_layer.eval()
    probe = next(iter(validation.first(1)))
    device = next(meta_layer.parameters(), torch.empty(0)).device
    with torch.no_grad():
        adapted = meta_layer.adapt(probe.support.to(device))
        stated = meta_layer.query_distribution(adapted, probe.to(device), meta_layer.batch_norm)
    if stated.variance is not None:
        return meta_layer
    answers = predicted_queries(meta_layer, validation, steps)
    return ConstantVariance(meta_layer, mean_squares(answers)).to(device)


def mean_squares(answers: Answers) -> Tensor:
    """The mean squared error of each output over all queries, `[out_features]`."""
    squares = (answers.y - answers.found.prediction).square()[answers.mask > 0]
    return squares.mean(0).clamp(min=torch.finfo(torch.float32).tiny)
