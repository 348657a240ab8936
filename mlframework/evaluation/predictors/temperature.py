"""Temperature scaling: one number for all queries, chosen on validation tasks."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mlframework.evaluation.calibration import Answers, nll, predicted_queries
from mlframework.evaluation.predictors.predictor import DerivedPredictor, FittedPredictor, Wrapped
from mlframework.evaluation.task_set import TaskSet
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.meta_layers.predictive import Predictive

__all__ = ["Temperature", "Tempered", "best_temperature"]

#: The temperatures that are tried lie between this and its inverse.
HOTTEST = 1e4


class Temperature(DerivedPredictor):
    """Divides the logits of classes, or multiplies the variance of values, by the likeliest temperature.

    The likeliest one gives the targets of all validation queries the highest probability. Neither the likeliest class
    nor an expected value changes.

    Reference: Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599, section 4.2; the variance:
        Levi et al., Evaluating and Calibrating Uncertainty Prediction in Regression Tasks, 2022, arXiv:1905.11659.
    """

    def fitted(self, meta_layer: MetaLayer, validation: TaskSet, steps: int) -> FittedPredictor:
        temperature = best_temperature(predicted_queries(meta_layer, validation, steps))
        rescaled = functools.partial(tempered, temperature=temperature)
        return FittedPredictor(Tempered(meta_layer, temperature), f"{temperature:.3g}", rescaled)


class Tempered(Wrapped):
    """The softmax of `logits / temperature`, or `temperature` times the variance."""

    def __init__(self, inner: MetaLayer, temperature: float) -> None:
        super().__init__(inner)
        self.temperature = temperature

    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive:
        return tempered(self.inner.predict_distribution(adapted, x, mask), self.temperature)


def tempered(found: Predictive, temperature: float) -> Predictive:
    if found.variance is None:
        return Predictive(found.prediction / temperature)
    return Predictive(found.prediction, found.variance * temperature)


def best_temperature(answers: Answers) -> float:
    """The temperature with the lowest negative log probability of the targets, over tasks."""
    from scipy.optimize import minimize_scalar  # here: a run's first step need not wait for it

    if answers.found.variance is not None:
        scores = (answers.y - answers.found.prediction).square() / answers.found.variance
        return float(mean_over_tasks(scores.mean(-1), answers.mask).clamp(1 / HOTTEST, HOTTEST))

    def cost(logarithm: float) -> float:
        return float(nll(answers._replace(found=tempered(answers.found, math.exp(logarithm)))).mean())

    bounds = (-math.log(HOTTEST), math.log(HOTTEST))
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def mean_over_tasks(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over tasks of each task's mean over queries, of values `[tasks, n]`."""
    return (torch.where(mask > 0, values, 0).sum(1) / mask.sum(1)).mean()
