"""Conventional learning, to be judged beside meta-learning on the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples, Kind, Params, masked_mean
from mlframework.evaluation.choices import thinned
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop import InnerUpdate
from mlframework.inner_loop.inner_loop import inner_loop, last
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text import TextTasks
from mlframework.text.ngram import NGramModel

if TYPE_CHECKING:
    # scikit-learn takes a second to import, which a training need not wait for: it is where it is first used.
    from sklearn.base import BaseEstimator

__all__ = ["FittedEstimators", "FromScratch", "estimator_for", "grid", "kind_of", "ngram_values", "raw_inputs"]

#: The settings of scikit-learn's estimators that are tuned, where an estimator has them: penalties and widths.
GRID: dict[str, tuple[float, ...]] = {
    "C": (0.01, 0.1, 1.0, 10.0, 100.0),
    "alpha": (0.001, 0.01, 0.1, 1.0, 10.0),
    "gamma": (0.02, 0.1, 0.5, 2.0),
}

#: The logarithm of a probability that counts as none.
LEAST = float(np.log(1e-12))


class FromScratch(MetaLayer):
    """The same network, trained on each support set alone from a random initialisation of its own.

    Args:
        make_base_layer: draws a newly initialised network from torch's global generator.
        task: says what the loss and the metrics are.
        update: builds the optimizer's rule from the parameters.
        steps: of it, on the whole support set.
    """

    exact = False

    def __init__(
        self,
        make_base_layer: Callable[[], BaseLayer],
        task: TaskDistribution,
        *,
        update: Callable[[Params], InnerUpdate],
        steps: int,
    ) -> None:
        super().__init__(make_base_layer(), task)
        self.make_base_layer = make_base_layer
        self.update = update(dict(self.base_layer.named_parameters()))
        self.test_inner_steps = steps

    def initial(self, like: Tensor) -> Params:
        """Stacked parameters of one new network per task, on the device of `like` `[tasks, ...]`."""
        networks = [dict(self.make_base_layer().named_parameters()) for _ in range(len(like))]
        return {name: torch.stack([n[name].detach() for n in networks]).to(like.device) for name in networks[0]}

    def adapt(self, support: Examples) -> Params:
        return last(self.trajectory(support, self.test_inner_steps))

    def predict(self, adapted: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.call_base_layer(adapted, x, mask)

    def trajectory(self, support: Examples, steps: int) -> Iterator[Params]:
        """Parameters after each of the `thinned` numbers of steps."""

        def losses_of(params: Params, step: int) -> Tensor:
            mask = self.mask_or_none(support.mask)
            return masked_mean(self.task.loss(self.predict(params, support.x, mask), support.y), mask)

        path = inner_loop(losses_of, self.initial(support.mask), self.update, steps, detached_steps=steps)
        shown = set(thinned(steps))
        yield from (params for step, params in enumerate(path) if step in shown)


class FittedEstimators(FeatureMetaLayer):
    """A scikit-learn estimator, fitted to the features of each support set.

    No gradient passes through it, so the features are taken as they are: those of a trained network, or the raw inputs
    (see `raw_inputs`).

    Args:
        base_layer: only its `features` are used.
        task: says what the loss and the metrics are.
        estimator: cloned for every task.
        batch_norm: see `FeatureMetaLayer`.

    >>> from sklearn.kernel_ridge import KernelRidge
    >>> from mlframework.tasks import Sinusoid
    >>> fitted = FittedEstimators(raw_inputs(), Sinusoid(), estimator=KernelRidge(kernel="rbf"))
    >>> episode = Sinusoid().sample(2, "test", torch.Generator().manual_seed(0))
    >>> fitted.predict(fitted.adapt(episode.support), episode.query.x).shape
    torch.Size([2, 10, 1])
    """

    kinds = ("classification", "regression")
    exact = False

    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        estimator: BaseEstimator,
        batch_norm: BatchNormPolicy = "support",
    ) -> None:
        super().__init__(base_layer, task, batch_norm=batch_norm)
        self.estimator = estimator

    def fit(self, features: Tensor, support: Examples) -> list[BaseEstimator]:
        return [self.fitted(*leaves) for leaves in zip(features, support.y, support.mask, strict=True)]

    def fitted(self, features: Tensor, y: Tensor, mask: Tensor) -> BaseEstimator:
        """One task's estimator, from the rows that count."""
        from sklearn.base import clone

        kept = mask > 0
        return clone(self.estimator).fit(as_array(features[kept]), as_array(y[kept]))

    def outputs(self, adapted: list[BaseEstimator], features: Tensor) -> Tensor:
        width = self.task.spec.out_features
        found = [scores(e, as_array(rows), width) for e, rows in zip(adapted, features, strict=True)]
        dtype = features.dtype if features.is_floating_point() else torch.get_default_dtype()  # tokens are not
        return torch.from_numpy(np.stack(found)).to(features.device, dtype)


def ngram_values(task: TextTasks, tasks: TaskSet, *, order: int, validation: TaskSet) -> Metrics:
    """How an n-gram model of all training text and each support set predicts the queries, `[1, tasks]` each.

    Args:
        task: of text.
        tasks: the task set.
        order: tokens of the longest n-grams.
        validation: the tasks on which it chooses how far to trust a support set.
    """
    rows = task.rows("train")
    train = rows.examples(torch.arange(len(rows.lengths)))
    model = NGramModel(task.spec.out_features, order=order)
    model.fit_background(*train)
    model.tune(validation)
    losses, bits = [], []
    for episode in tasks:
        query = episode.query
        losses.append(masked_mean(-model.log_probabilities(episode.support, query), query.mask))
        bits.append(task.bits_per_character(losses[-1], query.y, query.mask))
    return {"query_loss": torch.cat(losses)[None], "query_bits_per_character": torch.cat(bits)[None]}


def raw_inputs() -> BaseLayer:
    """A base layer whose features are the inputs themselves."""
    return BaseLayer(nn.Flatten(), nn.Identity())


def as_array(tensor: Tensor) -> np.ndarray:
    """What scikit-learn reads."""
    return tensor.detach().cpu().numpy()


def scores(estimator: BaseEstimator, x: np.ndarray, width: int) -> np.ndarray:
    """What a fitted estimator predicts: values or, of a classifier, a score per class, more being likelier.

    Args:
        estimator: fitted.
        x: examples `[n, d]`.
        width: values per example, or classes; the estimator may have met only some of them.

    Returns:
        `[n, width]`; a class that was not met is the least likely.
    """
    if kind_of(estimator) == "regression":
        return np.asarray(estimator.predict(x)).reshape(len(x), -1)
    known = known_scores(estimator, x)
    whole = np.full((len(x), width), min(known.min() - 1, LEAST))
    whole[:, estimator.classes_.astype(int)] = known
    return whole


def known_scores(estimator: BaseEstimator, x: np.ndarray) -> np.ndarray:
    """Scores `[n, classes met]`: logarithms of probabilities where there are such, else the decision function."""
    if hasattr(estimator, "predict_proba"):
        return np.log(np.clip(estimator.predict_proba(x), np.exp(LEAST), 1))
    if not hasattr(estimator, "decision_function"):
        chosen = np.asarray(estimator.predict(x))[:, None] == estimator.classes_
        return np.where(chosen, 0.0, LEAST)
    decision = estimator.decision_function(x)
    # Of two classes, scikit-learn gives the second's margin alone.
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision


def estimator_for(kind: Kind) -> BaseEstimator:
    """What stands for conventional learning on raw inputs: logistic regression, or kernel ridge regression (RBF)."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import LogisticRegression

    if kind == "classification":
        return LogisticRegression(max_iter=1000)
    return KernelRidge(kernel="rbf", alpha=0.1, gamma=0.5)


def grid(estimator: BaseEstimator) -> Iterator[tuple[str, BaseEstimator]]:
    """Copies of an estimator with each setting of `GRID` that it has, each in words; a width only of an RBF kernel.

    >>> from sklearn.svm import LinearSVC
    >>> [setting for setting, _ in grid(LinearSVC())]
    ['C=0.01', 'C=0.1', 'C=1', 'C=10', 'C=100']
    """
    from sklearn.base import clone
    from sklearn.model_selection import ParameterGrid

    has = estimator.get_params(deep=False)
    tuned = {name: values for name, values in GRID.items() if name in has}
    if has.get("kernel") != "rbf":
        tuned.pop("gamma", None)
    for settings in ParameterGrid(tuned):
        yield (
            ", ".join(f"{name}={value:g}" for name, value in settings.items()),
            clone(estimator).set_params(**settings),
        )


def kind_of(estimator: BaseEstimator) -> Kind:
    """The kind of task that an estimator is for: a classifier for a classification, any other for a regression."""
    from sklearn.base import is_classifier

    return "classification" if is_classifier(estimator) else "regression"
