"""scikit-learn, fitted to each support set: on raw inputs, which is conventional learning, and on trained features."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples, Kind
from mlframework.errors import InvalidValue
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import task_values
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import BatchNormPolicy
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FittedEstimators", "OnFeatures", "ScikitLearn", "TaskEstimator", "default_estimator", "grid", "raw_inputs"]

log = logging.getLogger(__name__)

#: The settings of scikit-learn's estimators that are tuned, where an estimator has them: penalties and widths.
GRID: dict[str, tuple[float, ...]] = {
    "C": (0.001, 0.01, 0.1, 1.0, 10.0, 100.0),
    "alpha": (1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 0.001, 0.01, 0.1, 1.0, 10.0),
    "gamma": (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 2.0),
}

#: Probabilities up to this count as zero.
LEAST = 1e-12


class ScikitLearn(Baseline):
    """A scikit-learn estimator, fitted to the raw inputs of each support set; there is none for sequences.

    One that is given is judged as it is; None takes one by the kind of task, and tunes it.
    """

    def __init__(self, *, estimator: Any = None) -> None:
        self.estimator = estimator

    def check(self, task: TaskDistribution) -> None:
        if self.estimator is not None:
            check_estimator("estimator", self.estimator, task)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        kind = trial.task.spec.kind
        if kind not in FittedEstimators.kinds:
            log.warning("%s: left out, it has no estimator for a %s", name, kind)
            return
        estimator = self.estimator or default_estimator(kind)
        settings = [("", estimator)] if self.estimator else grid(estimator)
        choice = trial.choose(candidates(settings, raw_inputs(), trial, "support"))
        yield trial.row(f"scikit-learn {type(estimator).__name__}", "none", choice)


class OnFeatures(Baseline):
    """scikit-learn estimators, each fitted to the features of the base layer as they are before it adapts.

    Each has a row of the report, by its name.
    """

    def __init__(self, **estimators: Any) -> None:
        self.estimators = estimators

    def check(self, task: TaskDistribution) -> None:
        for name, estimator in self.estimators.items():
            check_estimator(name, estimator, task)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        layer = trial.meta_layer
        for each, estimator in self.estimators.items():
            choice = trial.choose(candidates(grid(estimator), layer.base_layer, trial, layer.batch_norm))
            yield trial.row(f"{each} on features", trial.shown(layer.batch_norm), choice)


def default_estimator(kind: Kind) -> Any:
    """Logistic regression for a classification, kernel ridge regression (RBF) for a regression."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import LogisticRegression

    if kind == "classification":
        return LogisticRegression(max_iter=1000)
    return KernelRidge(kernel="rbf", alpha=0.1, gamma=0.5)


class TaskEstimator(NamedTuple):
    """A fitted estimator, and the number that replaces a probability of zero."""

    estimator: Any
    least: float = LEAST


class FittedEstimators(FeatureMetaLayer):
    """A scikit-learn estimator, cloned and fitted to the features of each support set.

    No gradient passes through it, so the features are taken as they are: those of a trained network, or the raw inputs
    (see `raw_inputs`).

    Of n support examples with K classes, a probability of zero becomes `1 / (n + K)`, before the division by the sum:
    what Laplace's rule of succession gives to a class that was never seen. Otherwise a support set without a class, or
    trees that agree, would make the cross-entropy as large as the chosen zero, whatever else an estimator does.
    """

    kinds = ("classification", "regression")
    exact = False

    def __init__(
        self, base_layer: BaseLayer, task: TaskDistribution, *, estimator: Any, batch_norm: BatchNormPolicy = "support"
    ) -> None:
        super().__init__(base_layer, task, batch_norm=batch_norm)
        self.estimator = estimator

    def fit(self, features: Tensor, support: Examples) -> list[TaskEstimator]:
        width = self.task.spec.out_features
        tasks = zip(features, support.y, support.mask > 0, strict=True)
        kept = [(x[counts].numpy(force=True), y[counts].numpy(force=True)) for x, y, counts in tasks]
        return [TaskEstimator(fitted(self.estimator, x, y), 1 / (len(x) + width)) for x, y in kept]

    def outputs(self, adapted: list[TaskEstimator], features: Tensor) -> Tensor:
        width, tasks = self.task.spec.out_features, zip(adapted, features, strict=True)
        found = [scores(own.estimator, x.numpy(force=True), width, least=own.least) for own, x in tasks]
        dtype = features.dtype if features.is_floating_point() else torch.get_default_dtype()  # tokens are not
        return torch.from_numpy(np.stack(found)).to(features.device, dtype)


def fitted(estimator: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """A copy of an estimator, fitted to inputs `[n, d]`; the constant model where the examples have a single class.

    A single target has no axis of its own, several have an estimator each, and there are at most as many neighbours as
    examples. Numbers are float64: in float32 the line search of a logistic regression may fail.
    """
    from scipy.linalg import LinAlgWarning
    from sklearn.base import clone
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.multioutput import MultiOutputRegressor

    if kind_of(estimator) == "classification" and len(np.unique(y)) < 2:
        return DummyClassifier().fit(x, y)
    x, own = x.astype(np.float64), clone(estimator)
    neighbours = {name: n for name, n in own.get_params().items() if name.rpartition("__")[2] == "n_neighbors"}
    own.set_params(**{name: min(n, len(x)) for name, n in neighbours.items()})
    if y.ndim == 2 and y.shape[1] > 1:
        own = MultiOutputRegressor(own)
    with warnings.catch_warnings():
        for seen in (ConvergenceWarning, LinAlgWarning):  # a setting that ends early, or rounds, is judged as it is
            warnings.simplefilter("ignore", seen)
        warnings.filterwarnings("ignore", "Singular matrix in solving dual problem")
        return own.fit(x, y[:, 0] if y.shape[1:] == (1,) else y)


def raw_inputs() -> BaseLayer:
    """A base layer whose features are the inputs themselves."""
    return BaseLayer(nn.Flatten(), nn.Identity())


def scores(estimator: Any, x: np.ndarray, width: int, *, least: float = LEAST) -> np.ndarray:
    """The predictions `[n, width]` of a fitted estimator for examples `[n, d]`: values, or a logit of each class.

    The logit is the logarithm of the class's probability; `least` stands for a probability of zero.
    """
    if kind_of(estimator) == "regression":
        return np.asarray(estimator.predict(x)).reshape(len(x), -1)
    found = np.zeros((len(x), width))
    found[:, estimator.classes_.astype(int)] = probabilities(estimator, x)
    found = np.where(found > LEAST, found, least)
    return np.log(found / found.sum(1, keepdims=True))


def probabilities(estimator: Any, x: np.ndarray) -> np.ndarray:
    """Of the classes that an estimator has met, `[n, classes]`; margins of a decision function count as logits."""
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(x))
    if not hasattr(estimator, "decision_function"):
        return np.asarray(estimator.predict(x))[:, None] == estimator.classes_
    from scipy.special import softmax  # here: a run's first step need not wait for it

    decision = estimator.decision_function(x)
    # Of two classes, scikit-learn gives the second's margin alone.
    return softmax(np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision, axis=1)


def grid(estimator: Any) -> Iterator[tuple[str, Any]]:
    """Copies of an estimator with each setting of `GRID` that it has, each in words; a width only of an RBF kernel.

    >>> from sklearn.svm import LinearSVC
    >>> [setting for setting, _ in grid(LinearSVC())]
    ['C=0.001', 'C=0.01', 'C=0.1', 'C=1', 'C=10', 'C=100']
    """
    from sklearn.base import clone
    from sklearn.model_selection import ParameterGrid

    has = estimator.get_params(deep=False)
    tuned = {name: values for name, values in GRID.items() if name in has}
    if has.get("kernel") != "rbf":
        tuned.pop("gamma", None)
    for settings in ParameterGrid(tuned):
        named = ", ".join(f"{name}={value:g}" for name, value in settings.items())
        yield named, clone(estimator).set_params(**settings)


def kind_of(estimator: Any) -> Kind:
    """The kind of task that an estimator is for: a classifier for a classification, any other for a regression."""
    from sklearn.base import is_classifier

    return "classification" if is_classifier(estimator) else "regression"


def check_estimator(field: str, estimator: Any, task: TaskDistribution) -> None:
    """Refuses an object that cannot be fitted, settings that its `fit` would refuse, and tasks of another kind."""
    if not hasattr(estimator, "fit"):
        raise InvalidValue(field, estimator, "must be a scikit-learn estimator, by its _target_")
    try:
        getattr(estimator, "_validate_params", lambda: None)()
    except ValueError as error:
        raise InvalidValue(field, estimator, str(error)) from error
    if (takes := kind_of(estimator)) != task.spec.kind:
        name, why = type(estimator).__name__, f"takes a {takes}, and {type(task).__name__} is a {task.spec.kind}"
        raise InvalidValue(field, name, why)


def candidates(
    estimators: Iterable[tuple[str, Any]], base_layer: BaseLayer, trial: Trial, batch_norm: BatchNormPolicy
) -> Iterator[Candidate]:
    """Estimators, each with its setting in words (see `grid`), to be judged on the features of a base layer."""
    for named, estimator in estimators:
        fitted = FittedEstimators(base_layer, trial.task, estimator=estimator, batch_norm=batch_norm)
        fitted.engine = trial.meta_layer.engine
        yield Candidate(functools.partial(task_values, fitted, steps=0, device=trial.device), (1,), named)
