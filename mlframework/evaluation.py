"""Honest evaluation: an algorithm judged on frozen, hashed tasks, conventional learning beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.baselines import FittedEstimators, FromScratch, estimator_for, judge_ngrams, kind_of, raw_inputs
from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.judging import Interval, TaskSet, judge_tasks
from mlframework.meta_layers.gradient_descent import MAML
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer
from mlframework.meta_layers.neural_network.in_context import InContext
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text import TextTasks
from mlframework.text.quality import Quality, TextQuality

__all__ = ["Evaluation", "Report", "Row"]

log = logging.getLogger(__name__)


class Estimator(Protocol):
    """What scikit-learn calls an estimator; its own class takes a second to import, checking a config must not."""

    def fit(self, x: Any, y: Any) -> Any: ...

    def predict(self, x: Any) -> Any: ...


class Row(NamedTuple):
    """What one method reached.

    Attributes:
        method: which.
        batch_norm: the policy by which its queries were normalised; `none` where nothing mixes examples.
        tasks: how many of the task set, from its beginning.
        steps: the training steps on the support set after which it was judged.
        metrics: each query metric's interval after each of them.
    """

    method: str
    batch_norm: str
    tasks: int
    steps: tuple[int, ...]
    metrics: dict[str, list[Interval]]


class Report(NamedTuple):
    """An evaluation: which tasks, and a row per method.

    Attributes:
        task_hash: sixteen hexadecimal digits; equal digits are equal tasks.
        split: which tasks were drawn.
        tasks: how many.
        seed: of the draws.
        rows: the trained algorithm first.
        quality: of generated texts, where that was asked for of a text task.
    """

    task_hash: str
    split: Split
    tasks: int
    seed: int
    rows: list[Row]
    quality: Quality | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; an interval is its mean, half width and number of values."""
        rows = [
            {**row._asdict(), "metrics": {n: [i._asdict() for i in steps] for n, steps in row.metrics.items()}}
            for row in self.rows
        ]
        return {**self._asdict(), "rows": rows, "quality": None if self.quality is None else self.quality.to_json()}


def policies(meta_layer: MetaLayer) -> tuple[BatchNormPolicy, ...]:
    """The policies by which queries are judged: one with, one without sight of the other queries."""
    if not meta_layer.base_layer.mixes_examples:
        return (meta_layer.batch_norm,)
    return ("support", "transductive") if meta_layer.batch_norm == "support" else ("transductive", "inductive")


class Evaluation:
    """Judges an algorithm on test tasks that are always the same, with conventional learning beside it.

    Args:
        tasks: how many.
        seed: of the draws; same seed, same tasks.
        split: which tasks; `test` unless something is being looked into.
        inner_steps: inner steps up to which metrics are taken; None takes the algorithm's own number.
        chunk: tasks at a time.
        scratch_tasks: tasks (the first ones) on which the network is also trained from scratch; 0 leaves that out.
        scratch_steps: steps of Adam from scratch.
        scratch_lr: its rate.
        estimator: a scikit-learn estimator for raw inputs; None chooses one by the kind of task.
        in_context: whether a sequence model is also judged as it is, with the support set in front of each query.
        ngram_order: tokens in the longest n-grams of the baseline for text; 0 leaves that out.
        quality: judges generated texts; None leaves that out.
        on_features: scikit-learn estimators by name, each fitted to the features of the algorithm's base layer as they
            are before it adapts.
    """

    def __init__(
        self,
        *,
        tasks: int,
        seed: int,
        split: Split = "test",
        inner_steps: int | None = None,
        chunk: int = 50,
        scratch_tasks: int = 100,
        scratch_steps: int = 100,
        scratch_lr: float = 0.01,
        estimator: Estimator | None = None,
        in_context: bool = True,
        ngram_order: int = 12,
        quality: TextQuality | None = None,
        on_features: Mapping[str, Estimator] | None = None,
    ) -> None:
        for field, value in {"tasks": tasks, "chunk": chunk, "scratch_steps": scratch_steps}.items():
            if value < 1:
                raise InvalidValue(field, value, "must be at least 1")
        if split not in ("train", "validation", "test"):
            raise InvalidValue("split", split, "must be train, validation or test")
        if inner_steps is not None and inner_steps < 0:
            raise InvalidValue("inner_steps", inner_steps, "must be at least 0, or null for the algorithm's own number")
        if scratch_tasks < 0:
            raise InvalidValue("scratch_tasks", scratch_tasks, "must be at least 0")
        if not scratch_lr > 0:
            raise InvalidValue("scratch_lr", scratch_lr, "must be above 0")
        self.tasks, self.seed, self.split, self.inner_steps, self.chunk = tasks, seed, split, inner_steps, chunk
        self.scratch_tasks, self.scratch_steps, self.scratch_lr = min(scratch_tasks, tasks), scratch_steps, scratch_lr
        if ngram_order < 0:
            raise InvalidValue("ngram_order", ngram_order, "must be at least 1, or 0 for no such baseline")
        self.estimator, self.on_features = estimator, dict(on_features or {})
        self.in_context, self.ngram_order, self.quality = in_context, ngram_order, quality

    def check(self, task: TaskDistribution) -> None:
        """Refuses estimators that are not for such tasks."""
        given = {"estimator": self.estimator, **{f"on_features.{name}": e for name, e in self.on_features.items()}}
        for name, estimator in given.items():
            if estimator is not None and (takes := kind_of(estimator)) != task.spec.kind:
                what = f"{type(estimator).__name__} takes a {takes}, and {type(task).__name__} is a {task.spec.kind}"
                raise UserError(f"evaluation.{name}: {what}")

    def run(
        self, name: str, meta_layer: MetaLayer, make_base_layer: Callable[[], BaseLayer], device: torch.device
    ) -> Report:
        """Judges `meta_layer`, called `name` in the report; `make_base_layer` draws networks to train from scratch."""
        self.check(meta_layer.task)
        tasks = self.task_set(meta_layer.task, self.tasks)
        steps = meta_layer.test_inner_steps if self.inner_steps is None else self.inner_steps
        rows = []
        for policy in policies(meta_layer):
            # Each query alone, beside the support set, costs as many passes as there are queries.
            few = policy == "inductive"
            metrics = judge_tasks(meta_layer, tasks, steps, device=device, batch_norm=policy, ends_only=few)
            judged = len(next(iter(metrics.values())))
            counted = (0, steps) if few and judged > 1 else tuple(range(judged))
            shown = policy if meta_layer.base_layer.mixes_examples else "none"
            rows.append(Row(name, shown, self.tasks, counted, metrics))
        rows += self.estimators_on_features(meta_layer, device)
        rows += self.baselines(meta_layer, make_base_layer, device)
        task, quality = meta_layer.task, None
        if self.quality is not None and isinstance(task, TextTasks):
            quality = self.quality.run(meta_layer, task, self.split, device=device)
        return Report(tasks.hash(), self.split, self.tasks, self.seed, rows, quality)

    def baselines(
        self, meta_layer: MetaLayer, make_base_layer: Callable[[], BaseLayer], device: torch.device
    ) -> list[Row]:
        """Rows of conventional learning, on the same tasks."""
        rows = []
        task = meta_layer.task
        if self.scratch_tasks:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                scratch = FromScratch(make_base_layer, task, lr=self.scratch_lr, steps=self.scratch_steps).to(device)
                scratch.engine = meta_layer.engine
                metrics = judge_tasks(
                    scratch, self.task_set(task, self.scratch_tasks), self.scratch_steps, device=device
                )
            policy = scratch.batch_norm_policy
            rows.append(Row("from scratch (Adam)", policy, self.scratch_tasks, (0, self.scratch_steps), metrics))
        if task.spec.kind in FittedEstimators.kinds:
            estimator = self.estimator or estimator_for(task.spec.kind)
            fitted = FittedEstimators(raw_inputs(), task, estimator=estimator)
            metrics = judge_tasks(fitted, self.task_set(task, self.tasks), 0, device=torch.device("cpu"))
            rows.append(Row(f"scikit-learn {type(estimator).__name__}", "none", self.tasks, (1,), metrics))
        if task.spec.kind == "sequence":
            rows += self.sequence_baselines(meta_layer, device)
        return rows

    def sequence_baselines(self, meta_layer: MetaLayer, device: torch.device) -> list[Row]:
        """Rows of the same network that reads the support set, and of n-grams, on the same tasks."""
        rows, task = [], meta_layer.task
        if self.in_context and isinstance(meta_layer, MAML):
            reader = InContext(meta_layer.base_layer, task)
            reader.engine = meta_layer.engine
            tasks = TaskSet(task, self.split, tasks=self.tasks, seed=self.seed, chunk=max(1, self.chunk // 5))
            try:
                metrics = judge_tasks(reader, tasks, 0, device=device)
                rows.append(Row("in context (same weights)", "none", self.tasks, (0,), metrics))
            except InvalidValue as error:  # learned positions know no sequence as long as that
                log.warning("in context: left out, base_layer.%s", error)
        if self.ngram_order and isinstance(task, TextTasks):
            metrics = judge_ngrams(task, self.task_set(task, self.tasks), order=self.ngram_order)
            rows.append(Row(f"{self.ngram_order}-gram of support and training text", "none", self.tasks, (1,), metrics))
        return rows

    def estimators_on_features(self, meta_layer: MetaLayer, device: torch.device) -> list[Row]:
        """Rows of scikit-learn's estimators on the algorithm's features, on the same tasks."""
        task = meta_layer.task
        rows = []
        for name, estimator in self.on_features.items():
            policy = meta_layer.batch_norm
            fitted = FittedEstimators(meta_layer.base_layer, task, estimator=estimator, batch_norm=policy)
            fitted.engine = meta_layer.engine
            metrics = judge_tasks(fitted, self.task_set(task, self.tasks), 0, device=device)
            rows.append(Row(f"{name} on features", fitted.batch_norm_policy, self.tasks, (1,), metrics))
        return rows

    def task_set(self, task: TaskDistribution, tasks: int) -> TaskSet:
        return TaskSet(task, self.split, tasks=tasks, seed=self.seed, chunk=self.chunk)
