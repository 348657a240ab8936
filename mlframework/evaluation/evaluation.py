"""Honest evaluation: an algorithm judged on frozen, hashed tasks, conventional learning beside it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch

from mlframework.backend.devices import fork_rng
from mlframework.backend.engine import Engine
from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.baselines import (
    FittedEstimators,
    FromScratch,
    estimator_for,
    grid,
    kind_of,
    ngram_values,
    raw_inputs,
)
from mlframework.evaluation.choices import Candidate, Choice, Rule, choose, other_rule, rules, thinned
from mlframework.evaluation.sources import Sources
from mlframework.evaluation.task_set import VALIDATION_SEED, Interval, TaskSet, policies, task_values
from mlframework.evaluation.text_quality import Quality, TextQuality
from mlframework.meta_layers.gradient_descent import MAML
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics
from mlframework.meta_layers.neural_network.in_context import InContext
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text import TextTasks

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
        setting: the choice on validation tasks, as `Adam 0.01`; empty for a method with one setting.
        chosen: the number of steps that was chosen there, one of `steps`.
        validation: the mean of the metric of choice on the validation tasks, at that choice.
        values: each query metric of every task after `chosen` steps.
        difference: each metric minus the first row's on the same tasks, paired; None in the first row.
    """

    method: str
    batch_norm: str
    tasks: int
    steps: tuple[int, ...]
    metrics: dict[str, list[Interval]]
    setting: str
    chosen: int
    validation: float
    values: dict[str, list[float]]
    difference: dict[str, Interval] | None = None

    def interval(self, metric: str) -> Interval:
        """That of a metric after the chosen number of steps."""
        return self.metrics[metric][self.steps.index(self.chosen)]


class Report(NamedTuple):
    """An evaluation: which tasks, and a row per method.

    Attributes:
        task_hash: sixteen hexadecimal digits; equal digits are equal tasks.
        split: which tasks were drawn.
        tasks: how many.
        seed: of the draws.
        validation_tasks: on how many tasks every method's choices were made.
        monitor: by which metric.
        sources: of each task; None where each task is a source of its own.
        rows: the trained algorithm first.
        quality: of generated texts, where that was asked for of a text task.
    """

    task_hash: str
    split: Split
    tasks: int
    seed: int
    validation_tasks: int
    monitor: str
    sources: Sources | None
    rows: list[Row]
    quality: Quality | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; an interval is its mean, half widths and number of values."""
        rows = [
            {
                **row._asdict(),
                "metrics": {n: [i._asdict() for i in steps] for n, steps in row.metrics.items()},
                "values": {n: [float(f"{value:.6g}") for value in values] for n, values in row.values.items()},
                "difference": row.difference and {n: i._asdict() for n, i in row.difference.items()},
            }
            for row in self.rows
        ]
        return {**self._asdict(), "rows": rows, "quality": None if self.quality is None else self.quality.to_json()}


def check_estimator(name: str, estimator: Any) -> None:
    """Refuses what cannot be fitted, and settings that scikit-learn would refuse after the training, when it fits."""
    if not hasattr(estimator, "fit"):
        raise UserError(f"evaluation.{name}={estimator}: must be a scikit-learn estimator, by its _target_")
    try:
        getattr(estimator, "_validate_params", lambda: None)()
    except ValueError as error:
        raise UserError(f"evaluation.{name}: {error}") from error


class Evaluation:
    """Judges an algorithm on test tasks that are always the same, with conventional learning beside it.

    Every method's choices are made on the same validation tasks, by the same metric: inner steps, update rules, rates,
    penalties. Test tasks choose nothing.

    Args:
        tasks: how many.
        seed: of the draws; same seed, same tasks.
        split: which tasks; `test` unless something is being looked into.
        validation_tasks: on how many validation tasks every method's choices are made.
        inner_steps: inner steps up to which metrics are taken; None takes the algorithm's own number. How many are
            taken in the end is chosen on the validation tasks.
        adam_rates, sgd_rates: of the update rules by which conventional training is tuned.
        tune_rule: whether these rules are tried in the algorithm's inner loop as well, beside its own; None: only where
            it was trained without adapting, so that its rule was chosen by nobody.
        chunk: tasks at a time.
        scratch_tasks: tasks (the first ones) on which the network is also trained from scratch; 0 leaves that out.
        scratch_steps: steps from scratch, at most.
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
        validation_tasks: int = 100,
        inner_steps: int | None = None,
        adam_rates: Sequence[float] = (0.001, 0.01, 0.1),
        sgd_rates: Sequence[float] = (0.01, 0.1),
        tune_rule: bool | None = None,
        chunk: int = 50,
        scratch_tasks: int = 100,
        scratch_steps: int = 100,
        estimator: Estimator | None = None,
        in_context: bool = True,
        ngram_order: int = 12,
        quality: TextQuality | None = None,
        on_features: Mapping[str, Estimator] | None = None,
    ) -> None:
        least = {"tasks": tasks, "chunk": chunk, "scratch_steps": scratch_steps, "validation_tasks": validation_tasks}
        for field, value in least.items():
            if value < 1:
                raise InvalidValue(field, value, "must be at least 1")
        if split not in ("train", "validation", "test"):
            raise InvalidValue("split", split, "must be train, validation or test")
        if inner_steps is not None and inner_steps < 0:
            raise InvalidValue("inner_steps", inner_steps, "must be at least 0, or null for the algorithm's own number")
        if scratch_tasks < 0:
            raise InvalidValue("scratch_tasks", scratch_tasks, "must be at least 0")
        for field, rates in {"adam_rates": adam_rates, "sgd_rates": sgd_rates}.items():
            if not all(rate > 0 for rate in rates):
                raise InvalidValue(field, list(rates), "must hold rates above 0")
        if not (adam_rates or sgd_rates):
            raise InvalidValue("adam_rates", "[]", "must hold a rate, or sgd_rates must")
        if ngram_order < 0:
            raise InvalidValue("ngram_order", ngram_order, "must be at least 1, or 0 for no such baseline")
        self.tasks, self.seed, self.split, self.inner_steps, self.chunk = tasks, seed, split, inner_steps, chunk
        self.rules, self.tune_rule = rules(adam=adam_rates, sgd=sgd_rates), tune_rule
        self.scratch_tasks, self.scratch_steps = min(scratch_tasks, tasks), scratch_steps
        self.validation_tasks = validation_tasks
        self.estimator, self.on_features = estimator, dict(on_features or {})
        self.in_context, self.ngram_order, self.quality = in_context, ngram_order, quality

    def check(self, task: TaskDistribution) -> None:
        """Refuses what is no estimator, settings that scikit-learn does not take, and estimators for other tasks."""
        given = {f"on_features.{name}": estimator for name, estimator in self.on_features.items()}
        if self.estimator is not None:
            given["estimator"] = self.estimator
        for name, estimator in given.items():
            check_estimator(name, estimator)
            if (takes := kind_of(estimator)) != task.spec.kind:
                what = f"{type(estimator).__name__} takes a {takes}, and {type(task).__name__} is a {task.spec.kind}"
                raise UserError(f"evaluation.{name}: {what}")

    def run(
        self,
        name: str,
        meta_layer: MetaLayer,
        make_base_layer: Callable[[], BaseLayer],
        device: torch.device,
        *,
        monitor: str = "query_loss",
    ) -> Report:
        """Judges an algorithm and its baselines.

        Args:
            name: of the algorithm, for the report.
            meta_layer: the algorithm.
            make_base_layer: draws networks to train from scratch.
            device: where tasks go.
            monitor: the metric by which every method's choices are made.
        """
        task = meta_layer.task
        self.check(task)
        trial = Trial(self, task, device, monitor)
        rows, choice = self.algorithm(name, meta_layer, trial)
        rows += self.estimators_on_features(meta_layer, trial)
        rows += self.baselines(meta_layer, make_base_layer, trial)
        quality = None
        if self.quality is not None and isinstance(task, TextTasks):
            with following(meta_layer, choice.candidate.rule):
                quality = self.quality.run(meta_layer, task, self.split, device=device, inner_steps=choice.steps)
        return Report(
            trial.tasks.hash(),
            self.split,
            self.tasks,
            self.seed,
            self.validation_tasks,
            monitor,
            trial.sources,
            [rows[0], *(row._replace(difference=difference(row, rows[0], trial.sources)) for row in rows[1:])],
            quality,
        )

    def algorithm(self, name: str, meta_layer: MetaLayer, trial: Trial) -> tuple[list[Row], Choice]:
        """A row for each policy, and what the first one chose, which holds for the other."""
        first, *others = policies(meta_layer)
        choice = trial.choose(self.settings(meta_layer, trial, first))
        rows = [trial.row(name, shown(first, meta_layer), choice)]
        for policy in others:
            # Each query alone, beside the support set, costs as many passes as there are queries.
            few, rule = policy == "inductive", choice.candidate.rule
            steps = choice.steps if few else max(choice.candidate.steps)
            other = self.setting(meta_layer, trial, policy, rule, steps, ends_only=few)
            same = choice._replace(candidate=other, row=other.steps.index(choice.steps))
            rows.append(trial.row(name, shown(policy, meta_layer), same))
        return rows, choice

    def settings(self, meta_layer: MetaLayer, trial: Trial, policy: BatchNormPolicy) -> Iterator[Candidate]:
        """The algorithm by its own rule and, where that is asked for, by those of conventional training."""
        steps = meta_layer.test_inner_steps if self.inner_steps is None else self.inner_steps
        yield self.setting(meta_layer, trial, policy, None, steps)
        tune = meta_layer.trained_inner_steps == 0 if self.tune_rule is None else self.tune_rule
        if isinstance(meta_layer, MAML) and tune:
            for rule in self.rules:
                yield self.setting(meta_layer, trial, policy, rule, steps)

    def setting(
        self,
        meta_layer: MetaLayer,
        trial: Trial,
        policy: BatchNormPolicy,
        rule: Rule | None,
        steps: int,
        *,
        ends_only: bool = False,
    ) -> Candidate:
        """The algorithm under a policy, by its own rule (None) or another."""

        def judge(tasks: TaskSet) -> Metrics:
            with following(meta_layer, rule):
                return task_values(
                    meta_layer, tasks, steps, device=trial.device, batch_norm=policy, ends_only=ends_only
                )

        counted = range(steps + 1) if meta_layer.test_inner_steps else (0,)
        return Candidate(judge, sorted({0, steps}) if ends_only and len(counted) > 1 else counted, rule=rule)

    def baselines(self, meta_layer: MetaLayer, make_base_layer: Callable[[], BaseLayer], trial: Trial) -> list[Row]:
        """Rows of conventional learning, on the same tasks."""
        rows = []
        task = meta_layer.task
        if self.scratch_tasks:
            choice = trial.choose(self.from_scratch(rule, meta_layer, make_base_layer, trial) for rule in self.rules)
            policy = shown("transductive", meta_layer)
            rows.append(trial.row("from scratch", policy, choice, tasks=self.scratch_tasks))
        if task.spec.kind in FittedEstimators.kinds:
            given = self.estimator
            candidates = grid(estimator_for(task.spec.kind)) if given is None else [("", given)]
            name = f"scikit-learn {type(given or estimator_for(task.spec.kind)).__name__}"
            fitted = ((named, FittedEstimators(raw_inputs(), task, estimator=each)) for named, each in candidates)
            rows.append(trial.row(name, "none", trial.choose(fitted_candidates(fitted, torch.device("cpu")))))
        if task.spec.kind == "sequence":
            rows += self.sequence_baselines(meta_layer, trial)
        return rows

    def from_scratch(
        self, rule: Rule, meta_layer: MetaLayer, make_base_layer: Callable[[], BaseLayer], trial: Trial
    ) -> Candidate:
        """The network trained by a rule from random parameters, the same ones for every rule."""

        def judge(tasks: TaskSet) -> Metrics:
            with fork_rng(trial.device):
                torch.manual_seed(tasks.seed)
                scratch = FromScratch(make_base_layer, trial.task, update=rule.update, steps=self.scratch_steps)
                scratch.engine = meta_layer.engine
                return task_values(scratch.to(trial.device), tasks, self.scratch_steps, device=trial.device)

        return Candidate(judge, thinned(self.scratch_steps), rule=rule)

    def sequence_baselines(self, meta_layer: MetaLayer, trial: Trial) -> list[Row]:
        """Rows of the same network that reads the support set, and of n-grams, on the same tasks."""
        rows, task = [], meta_layer.task
        if self.in_context and isinstance(meta_layer, MAML):
            reader = InContext(meta_layer.base_layer, task)
            reader.engine = meta_layer.engine

            def read(tasks: TaskSet) -> Metrics:
                return task_values(reader, tasks.by(max(1, self.chunk // 5)), 0, device=trial.device)

            try:
                choice = trial.choose([Candidate(read, (0,))])
                rows.append(trial.row("in context (same weights)", "none", choice))
            except InvalidValue as error:  # learned positions know no sequence as long as that
                log.warning("in context: left out, base_layer.%s", error)
        if self.ngram_order and isinstance(task, TextTasks):
            ngrams = functools.partial(ngram_values, task, order=self.ngram_order, validation=trial.validation)
            choice = trial.choose([Candidate(ngrams, (1,))])
            rows.append(trial.row(f"{self.ngram_order}-gram of support and training text", "none", choice))
        return rows

    def estimators_on_features(self, meta_layer: MetaLayer, trial: Trial) -> list[Row]:
        """Rows of scikit-learn's estimators on the algorithm's features, on the same tasks."""
        rows, policy = [], meta_layer.batch_norm
        for name, estimator in self.on_features.items():
            fitted = (
                (
                    setting,
                    FittedEstimators(meta_layer.base_layer, trial.task, estimator=candidate, batch_norm=policy),
                )
                for setting, candidate in grid(estimator)
            )
            choice = trial.choose(fitted_candidates(fitted, trial.device, engine=meta_layer.engine))
            rows.append(trial.row(f"{name} on features", shown(policy, meta_layer), choice))
        return rows


class Trial:
    """The tasks of one evaluation: those on which methods choose, and those on which they are judged.

    Args:
        evaluation: says which.
        task: the distribution.
        device: where tasks go.
        monitor: the metric by which choices are made.
    """

    def __init__(self, evaluation: Evaluation, task: TaskDistribution, device: torch.device, monitor: str) -> None:
        self.task, self.device, self.monitor = task, device, monitor
        set_of = functools.partial(TaskSet, task, chunk=evaluation.chunk)
        self.tasks = set_of(evaluation.split, tasks=evaluation.tasks, seed=evaluation.seed)
        self.validation = set_of("validation", tasks=evaluation.validation_tasks, seed=VALIDATION_SEED)
        self.sources = self.tasks.sources()

    def choose(self, candidates: Iterable[Candidate]) -> Choice:
        """The setting that does best on the validation tasks."""
        higher = self.monitor.removeprefix("query_") in self.task.higher_is_better
        return choose(candidates, self.validation, self.monitor, higher_is_better=higher)

    def row(self, method: str, batch_norm: str, choice: Choice, *, tasks: int | None = None) -> Row:
        """Judges a choice on the task set, or on its first tasks."""
        judged = self.tasks.first(tasks) if tasks else self.tasks
        sources = self.sources and self.sources[: judged.tasks]
        candidate, row, value = choice
        values = candidate.judge(judged)
        metrics = {name: [Interval.of(step, sources) for step in steps] for name, steps in values.items()}
        at_choice = {name: steps[row].tolist() for name, steps in values.items()}
        steps = tuple(candidate.steps)
        return Row(method, batch_norm, judged.tasks, steps, metrics, candidate.setting, choice.steps, value, at_choice)


def fitted_candidates(
    fitted: Iterable[tuple[str, FittedEstimators]], device: torch.device, *, engine: Engine | None = None
) -> Iterator[Candidate]:
    """Each estimator, to be judged."""
    for setting, estimator in fitted:
        if engine is not None:
            estimator.engine = engine
        yield Candidate(functools.partial(task_values, estimator, steps=0, device=device), (1,), setting)


def following(meta_layer: MetaLayer, rule: Rule | None) -> AbstractContextManager[None]:
    """Lets the algorithm adapt by a rule for a while; None: by its own."""
    return nullcontext() if rule is None else other_rule(cast(MAML, meta_layer), rule)


def difference(row: Row, first: Row, sources: Sources | None) -> dict[str, Interval]:
    """Each metric of a row minus that of the first row on the same tasks."""
    found = {}
    for name in row.values.keys() & first.values.keys():
        ours, theirs = (torch.tensor(each.values[name][: row.tasks], dtype=torch.float64) for each in (row, first))
        found[name] = Interval.of(ours - theirs, sources and sources[: row.tasks])
    return found


def shown(policy: BatchNormPolicy, meta_layer: MetaLayer) -> str:
    """The policy, as a report names it."""
    return policy if meta_layer.base_layer.mixes_examples else "none"
