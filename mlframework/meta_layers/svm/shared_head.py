"""Ridge regression of the errors of a head that all tasks share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.svm.kernel_machine import Fitted, KernelMachine
from mlframework.meta_layers.svm.regularised import Ridge
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["SharedHeadRidge"]


class SharedHeadRidge(Ridge):
    """The base layer's head predicts for all tasks alike; each task's ridge regression corrects its errors.

    `f(x) = head(x) + <w, features(x)>`, where `w` is fitted to `y - head(x)` on the support set. Without a support set
    the prediction is the head's, whereas plain ridge regression predicts 0. That is Bayesian linear regression, with
    the head as the mean of the prior. See `Ridge` for the arguments; a regression has no `scale`.

    Reference: Harrison, Sharma, Pavone, Meta-Learning Priors for Efficient Online Bayesian Regression (ALPaCA), 2018,
        arXiv:1807.08912. Deviations: the prior's covariance is a learned multiple of the identity, where
        the paper learns all of it; the loss is the task's, where the paper takes the likelihood.
    """

    kinds = ("regression",)

    @with_settings_of(KernelMachine, but=["positive"])
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        reg: float = 1.0,
        learn: Collection[str] = ("reg",),
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, reg=reg, learn=learn, **settings)
        self.head = base_layer.head

    def fit(self, features: Tensor, support: Examples) -> Fitted:
        return super().fit(features, support._replace(y=support.y - self.head(features)))

    def outputs(self, adapted: Fitted, features: Tensor) -> Tensor:
        return self.head(features) + super().outputs(adapted, features)
