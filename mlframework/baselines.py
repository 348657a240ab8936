"""Conventional learning, to be judged beside meta-learning on the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples, Kind, masked_mean
from mlframework.inner_loop import Params, inner_loop
from mlframework.inner_updates import Adam
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FittedEstimators", "FromScratch", "estimator_for"]


class FromScratch(MetaLayer):
    """The same network, trained on each support set alone from a random initialisation of its own.

    Args:
        make_base_layer: draws a newly initialised network from torch's global generator.
        task: says what the loss and the metrics are.
        lr: rate of Adam.
        steps: steps of Adam on the whole support set.
    """

    exact = False

    def __init__(
        self, make_base_layer: Callable[[], BaseLayer], task: TaskDistribution, *, lr: float, steps: int
    ) -> None:
        super().__init__(make_base_layer(), task)
        self.make_base_layer = make_base_layer
        self.update = Adam(dict(self.base_layer.named_parameters()), lr)
        self.test_inner_steps = steps

    def initial(self, like: Tensor) -> Params:
        """Stacked parameters of one new network per task, on the device of `like` `[tasks, ...]`."""
        networks = [dict(self.make_base_layer().named_parameters()) for _ in range(len(like))]
        return {name: torch.stack([n[name].detach() for n in networks]).to(like.device) for name in networks[0]}

    def adapt(self, support: Examples) -> Params:
        *_, adapted = self.trajectory(support, self.test_inner_steps)
        return adapted

    def predict(self, adapted: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.call_base_layer(adapted, x, mask)

    def trajectory(self, support: Examples, steps: int) -> Iterator[Params]:
        """Parameters before and after training; what lies between is nobody's business."""

        def losses_of(params: Params, step: int) -> Tensor:
            prediction = self.predict(params, support.x, self.needed(support.mask))
            return masked_mean(self.task.loss(prediction, support.y), support.mask)

        last = self.initial(support.mask)
        yield last
        for params in inner_loop(losses_of, last, self.update, steps, constant_steps=steps):
            last = params
        yield last


class FittedEstimators(MetaLayer):
    """A scikit-learn estimator, fitted to the raw inputs of each support set.

    Args:
        base_layer: takes no part; it is here because every meta layer has one.
        task: says what the loss and the metrics are.
        estimator: cloned for every task.
    """

    exact = False

    def __init__(self, base_layer: BaseLayer, task: TaskDistribution, *, estimator: BaseEstimator) -> None:
        super().__init__(base_layer, task)
        self.estimator = estimator

    def adapt(self, support: Examples) -> list[BaseEstimator]:
        return [self.fitted(*leaves) for leaves in zip(*support, strict=True)]

    def fitted(self, x: Tensor, y: Tensor, mask: Tensor) -> BaseEstimator:
        """One task's estimator, from the rows that count."""
        kept = mask > 0
        return clone(self.estimator).fit(x[kept].flatten(1).cpu().numpy(), y[kept].cpu().numpy())

    def predict(self, adapted: list[BaseEstimator], x: Tensor, mask: Tensor | None = None) -> Tensor:
        found = [self.predicted(e, rows.flatten(1).cpu().numpy()) for e, rows in zip(adapted, x, strict=True)]
        return torch.from_numpy(np.stack(found)).to(x)

    def predicted(self, estimator: BaseEstimator, x: np.ndarray) -> np.ndarray:
        """Values, or logarithms of class probabilities (tiny where a class was absent): `[n, out_features]`."""
        if not is_classifier(estimator):
            return np.asarray(estimator.predict(x)).reshape(len(x), -1)
        scores = np.full((len(x), self.task.spec.out_features), 1e-12)
        scores[:, estimator.classes_.astype(int)] = np.clip(estimator.predict_proba(x), 1e-12, 1)
        return np.log(scores)


def estimator_for(kind: Kind) -> BaseEstimator:
    """What stands for conventional learning on raw inputs: logistic regression, or kernel ridge regression (RBF)."""
    if kind == "classification":
        return LogisticRegression(max_iter=1000)
    return KernelRidge(kernel="rbf", alpha=0.1, gamma=0.5)
