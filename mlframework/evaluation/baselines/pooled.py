"""One conventional estimator for the examples of all training tasks, which then meets each task's support set."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Examples
from mlframework.errors import InvalidValue, nearest
from mlframework.evaluation.baselines.conventional import Conventional, settings_of
from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, TaskEstimator, raw_inputs, scores
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet, task_values
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import MetaLayer, with_settings_of
from mlframework.solvers.linear import solve_each
from mlframework.tasks.tables.table_tasks import TableTasks
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["AddedRows", "Pooled", "PooledRows", "Shifted", "Sloped", "logistic_around", "training_rows"]

#: How an estimator of all training tasks makes use of a task's support set.
Support = Literal["none", "shift", "slopes", "added"]

#: The seed of the training tasks that are pooled where a task distribution has no end.
SEED = 2


class PooledRows(NamedTuple):
    """The examples of training tasks as one."""

    x: np.ndarray  # [rows, d]
    y: np.ndarray  # [rows], or [rows, out_features] where several numbers are predicted


class Pooled(Conventional):
    """An estimator fitted to the rows of all training tasks, with and without each test task's support set.

    `none` leaves the support set aside. `shift` moves the pooled predictions by the support set: by the residuals' sum
    over `n + strength` in a regression, which is a shrunken random intercept; by `(n_c + strength) / (e_c + strength)`
    for each class in a classification, of which `n_c` are observed and `e_c` were expected. `slopes` adds a linear
    model of each task, whose intercept and coefficients are shrunken: a random-slopes model around the pooled one, if
    that is linear. `added` fits the estimator anew for each task, with the support rows beside the training rows,
    `strength` times as heavy. Each has a row of the report. Validation tasks choose the settings first, and then the
    strength.

    Args:
        classifier, regressor, grid: see `Conventional`.
        tasks: the first tasks on which `added` is chosen and judged, for each is a fit; None: all.
        support: the ways in which the support set is used.
        strengths: of `shift`; of `slopes`, for the intercept and for the coefficients each.
        weights: of a support row under `added`.
        training_tasks: how many are drawn to be pooled, from a distribution that is no table.
    """

    @with_settings_of(Conventional)
    def __init__(
        self,
        *,
        support: Sequence[Support] = get_args(Support),
        strengths: Sequence[float] = (1, 3, 10, 30),
        weights: Sequence[float] = (1, 10),
        training_tasks: int = 200,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.support, self.training_tasks = list(support), at_least("training_tasks", training_tasks, 1)
        for each in self.support:
            if each not in get_args(Support):
                why = f"must hold {', '.join(get_args(Support))}{nearest(str(each), get_args(Support))}"
                raise InvalidValue("support", list(support), why)
        self.strengths, self.weights = list(strengths), list(weights)
        for field, values in (("strengths", strengths), ("weights", weights)):
            if not values or min(values) <= 0:
                raise InvalidValue(field, list(values), "must hold numbers above 0")

    def check(self, task: TaskDistribution) -> None:
        from sklearn.utils.validation import has_fit_parameter

        super().check(task)
        estimator = self.estimators[task.spec.kind]
        if "added" in self.support and not has_fit_parameter(estimator, "sample_weight"):
            why = "takes no weights of rows: leave added out of support"
            raise InvalidValue(self.field(task), type(estimator).__name__, why)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        rows, method = training_rows(trial.task, self.training_tasks), name.replace("_", " ")
        estimators = dict(settings_of(self.estimators[trial.task.spec.kind], self.grid))
        choice = trial.choose(self.pooled(rows, estimators, trial))
        if "none" in self.support:
            yield trial.row(method, "none", choice)
        named = choice.candidate.named
        few = trial._replace(validation=trial.validation.first(self.tasks)) if self.tasks else trial
        if "shift" in self.support:
            shifted = ((f"strength={s:g}", Shifted(trial.task, estimators[named], s)) for s in self.strengths)
            yield trial.row(f"{method}, support shift", "none", trial.choose(candidates(shifted, trial, named)))
        if "slopes" in self.support:
            pairs = itertools.product(self.strengths, self.strengths)
            sloped = ((f"strengths={a:g}, {b:g}", Sloped(trial.task, estimators[named], a, b)) for a, b in pairs)
            yield trial.row(f"{method}, support slopes", "none", trial.choose(candidates(sloped, trial, named)))
        if "added" in self.support:
            added = ((f"weight={w:g}", AddedRows(trial.task, estimators[named], rows, w)) for w in self.weights)
            choice = few.choose(candidates(added, trial, named))
            yield trial.row(f"{method}, support added", "none", choice, tasks=self.tasks)

    def pooled(self, rows: PooledRows, estimators: Mapping[str, Any], trial: Trial) -> Iterator[Candidate]:
        """The estimators in each setting, fitted to the training rows, without a support set."""
        for named, estimator in estimators.items():
            yield from candidates([(named, Shifted(trial.task, estimator.fit(*rows), math.inf))], trial)


class Shifted(FeatureMetaLayer):
    """An estimator of all training tasks whose predictions a support set shifts; by nothing at infinite strength."""

    exact = False

    def __init__(self, task: TaskDistribution, estimator: Any, strength: float) -> None:
        super().__init__(raw_inputs(), task)
        self.estimator, self.strength = estimator, strength

    def fit(self, features: Tensor, support: Examples) -> Tensor:
        """The shift of each task, `[tasks, out_features]`."""
        predicted, mask = self.predicted(features), support.mask.unsqueeze(-1)
        if self.strength == math.inf:
            return torch.zeros_like(predicted[:, 0])
        targets = self.targets(support)
        if self.task.spec.kind == "regression":
            return ((targets - predicted) * mask).sum(1) / (mask.sum(1) + self.strength)
        expected = (predicted.softmax(-1) * mask).sum(1)
        return ((targets.sum(1) + self.strength) / (expected + self.strength)).log()

    def outputs(self, adapted: Tensor, features: Tensor) -> Tensor:
        return self.predicted(features) + adapted.unsqueeze(1)

    def predicted(self, features: Tensor) -> Tensor:
        """The predictions `[tasks, n, out_features]` of the estimator of all tasks."""
        found = scores(self.estimator, features.flatten(0, 1).numpy(force=True), self.task.spec.out_features)
        return torch.from_numpy(found).to(features).unflatten(0, features.shape[:2])


class Sloped(Shifted):
    """An estimator of all training tasks, plus a penalised linear model of each task."""

    def __init__(self, task: TaskDistribution, estimator: Any, intercept: float, slopes: float) -> None:
        super().__init__(task, estimator, slopes)
        self.intercept = intercept

    def fit(self, features: Tensor, support: Examples) -> Tensor:
        """The coefficients of each task, `[tasks, inputs + 1, out_features]`."""
        x, mask = with_constant(features), support.mask.unsqueeze(-1).double()
        penalty = torch.full((x.shape[-1],), self.strength, dtype=x.dtype, device=x.device)
        penalty[-1] = self.intercept
        pooled, targets = self.predicted(features).double(), self.targets(support).double()
        if self.task.spec.kind == "regression":
            inner = (x * mask).mT @ x + torch.diag(penalty)
            return solve_each(inner, (x * mask).mT @ (targets - pooled))
        return logistic_around(pooled, x, targets, mask, penalty)

    def outputs(self, adapted: Tensor, features: Tensor) -> Tensor:
        return self.predicted(features) + (with_constant(features) @ adapted).to(features.dtype)


def with_constant(features: Tensor) -> Tensor:
    """Inputs `[tasks, n, ...]` as rows in float64, with a last input of 1."""
    rows = features.flatten(2).double()
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def logistic_around(offset: Tensor, x: Tensor, targets: Tensor, mask: Tensor, penalty: Tensor) -> Tensor:
    """The minimum of `sum cross_entropy(offset + x w, targets) + penalty w^2 / 2` over `w` `[tasks, inputs, classes]`.

    By Newton's method, all tasks at once.

    Args:
        offset, targets: logits and one-hot classes, `[tasks, n, classes]`.
        x: `[tasks, n, inputs]`.
        mask: which rows count, `[tasks, n, 1]`.
        penalty: of each input, above 0.
    """
    classes = targets.shape[-1]
    found = x.new_zeros(len(x), x.shape[-1], classes)
    ridge = torch.diag(penalty.repeat_interleave(classes))
    for _ in range(NEWTON_STEPS):
        p = (offset + x @ found).softmax(-1)
        gradient = x.mT @ ((p - targets) * mask) + penalty.unsqueeze(-1) * found
        curvature = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) * mask.unsqueeze(-1)
        hessian = torch.einsum("tni,tnab,tnj->tiajb", x, curvature, x).flatten(3, 4).flatten(1, 2) + ridge
        step = solve_each(hessian, gradient.flatten(1).unsqueeze(-1)).view_as(found)
        found = found - step
    return found


#: From 0 on, with a penalty, Newton's method is at rounding after these.
NEWTON_STEPS = 12


class AddedRows(FittedEstimators):
    """An estimator fitted to all training rows and to a task's support rows, which weigh `strength` times as much."""

    def __init__(self, task: TaskDistribution, estimator: Any, rows: PooledRows, strength: float) -> None:
        super().__init__(raw_inputs(), task, estimator=estimator)
        self.rows, self.strength = rows, strength

    def fit(self, features: Tensor, support: Examples) -> list[TaskEstimator]:
        return [self.fitted(*task) for task in zip(features, support.y, support.mask > 0, strict=True)]

    def fitted(self, x: Tensor, y: Tensor, kept: Tensor) -> TaskEstimator:
        from sklearn.base import clone

        rows, own = self.rows, as_rows(x[kept], y[kept])
        weights = np.concatenate([np.ones(len(rows.x)), np.full(len(own.x), self.strength)])
        both = (np.concatenate(parts) for parts in zip(rows, own, strict=True))
        return TaskEstimator(clone(self.estimator).fit(*both, sample_weight=weights))


def candidates(layers: Iterable[tuple[str, MetaLayer]], trial: Trial, named: str = "") -> Iterator[Candidate]:
    """Meta layers without inner steps, each with its setting in words after those in `named`."""
    for setting, layer in layers:
        judge = functools.partial(task_values, layer, steps=0, device=trial.device)
        yield Candidate(judge, (1,), ", ".join(filter(None, (named, setting))))


def training_rows(task: TaskDistribution, tasks: int) -> PooledRows:
    """All rows of a table's training tasks; of any other distribution those of some drawn training tasks."""
    if isinstance(task, TableTasks) and "sample" not in vars(task):  # see fix_train_tasks
        rows = task.rows("train")
        return as_rows(rows.x, rows.y)
    every = [episode.joined() for episode in TaskSet(task, "train", tasks=tasks, seed=SEED)]
    x = torch.cat([examples.x[examples.mask > 0] for examples in every])
    return as_rows(x, torch.cat([examples.y[examples.mask > 0] for examples in every]))


def as_rows(x: Tensor, y: Tensor) -> PooledRows:
    """Examples `[n, *x_shape]` for scikit-learn: flat inputs, and a single target without an axis of its own."""
    targets = y.numpy(force=True)
    return PooledRows(x.flatten(1).numpy(force=True), targets[:, 0] if targets.shape[1:] == (1,) else targets)
