"""Conventional learning, to be judged beside meta-learning on the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples, Kind, masked_mean
from mlframework.inner_loop import Params, inner_loop, last
from mlframework.inner_updates import Adam
from mlframework.judging import Interval, TaskSet
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer
from mlframework.meta_layers.on_features import OnFeatures
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text import TextTasks
from mlframework.text.ngram import NGramModel

if TYPE_CHECKING:
    # scikit-learn takes a second to import, which a training need not wait for: it is where it is first used.
    from sklearn.base import BaseEstimator

__all__ = ["FittedEstimators", "FromScratch", "estimator_for", "judge_ngrams", "kind_of", "raw_inputs"]

#: Validation tasks by which an n-gram model chooses how far to trust a support set; others than those that are judged.
TUNING_TASKS, TUNING_SEED = 100, 2

#: The logarithm of a probability that counts as none.
LEAST = float(np.log(1e-12))


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
        return last(self.trajectory(support, self.test_inner_steps))

    def predict(self, adapted: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.call_base_layer(adapted, x, mask)

    def trajectory(self, support: Examples, steps: int) -> Iterator[Params]:
        """Parameters before and after training; what lies between is nobody's business."""

        def losses_of(params: Params, step: int) -> Tensor:
            mask = self.needed(support.mask)
            return masked_mean(self.task.loss(self.predict(params, support.x, mask), support.y), mask)

        initial = self.initial(support.mask)
        yield initial
        yield last(inner_loop(losses_of, initial, self.update, steps, constant_steps=steps))


class FittedEstimators(OnFeatures):
    """A scikit-learn estimator, fitted to the features of each support set.

    No gradient passes through it, so the features are taken as they are: those of a trained network, or the raw inputs
    (see `raw_inputs`).

    Args:
        base_layer: only its `features` are used.
        task: says what the loss and the metrics are.
        estimator: cloned for every task.
        batch_norm: see `OnFeatures`.

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


def judge_ngrams(task: TextTasks, tasks: TaskSet, *, order: int) -> dict[str, list[Interval]]:
    """How an n-gram model of all training text and each support set predicts the queries of a task set.

    How far it trusts the support set is tuned on validation tasks.
    """
    rows = task.rows("train")
    train = rows.examples(torch.arange(len(rows.lengths)))
    model = NGramModel(task.spec.out_features, order=order)
    model.fit_background(*train)
    model.tune(TaskSet(task, "validation", tasks=TUNING_TASKS, seed=TUNING_SEED))
    losses, bits = [], []
    for episode in tasks:
        query = episode.query
        losses.append(masked_mean(-model.log_probabilities(episode.support, query), query.mask))
        bits.append(task.bits_per_character(losses[-1], query.y, query.mask))
    found = {"query_loss": torch.cat(losses), "query_bits_per_character": torch.cat(bits)}
    return {name: [Interval.of(values)] for name, values in found.items()}


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


def kind_of(estimator: BaseEstimator) -> Kind:
    """The kind of task that an estimator is for: a classifier for a classification, any other for a regression."""
    from sklearn.base import is_classifier

    return "classification" if is_classifier(estimator) else "regression"
