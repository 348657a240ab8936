"""Honest evaluation: an algorithm and its baselines, judged on frozen, hashed tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Split
from mlframework.errors import InvalidValue, part_of
from mlframework.evaluation.choices import Candidate, Choice, Rule, Trial, following, steps_by_rule
from mlframework.evaluation.part import Baseline, EvaluationPart, Measure
from mlframework.evaluation.report import MethodResult, Report, difference
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet, policies, task_values
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics
from mlframework.screen import stage
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Evaluation"]


@dataclass(kw_only=True)
class Evaluation:
    """Judges an algorithm on test tasks that are always the same, with baselines beside it.

    Every method's choices are made on the same validation tasks, by the same metric: inner steps, update rules, rates,
    penalties. Test tasks choose nothing.

    Args:
        tasks: how many.
        seed: of the draws; same seed, same tasks.
        split: which tasks; `test` unless something is being looked into.
        validation_tasks: on how many validation tasks every method's choices are made.
        inner_steps: inner steps up to which metrics are taken; None takes the algorithm's own number. How many are
            taken in the end is chosen on the validation tasks.
        adam_rates, sgd_rates: of the update rules over which conventional training is tuned.
        tune_rule: whether these rules are tried in the algorithm's inner loop as well, beside its own; None: only where
            it was trained without adapting, so that its rule was chosen by nobody.
        chunk: tasks at a time.
        baseline: methods that are judged beside the algorithm, by name.
        measure: further tables about the algorithm, by name.
    """

    tasks: int
    seed: int
    split: Split = "test"
    validation_tasks: int = 100
    inner_steps: int | None = None
    adam_rates: Sequence[float] = (0.001, 0.01, 0.1)
    sgd_rates: Sequence[float] = (0.01, 0.1)
    tune_rule: bool | None = None
    chunk: int = 50
    baseline: Mapping[str, Baseline] | None = None
    measure: Mapping[str, Measure] | None = None

    def __post_init__(self) -> None:
        for field in ("tasks", "chunk", "validation_tasks"):
            at_least(field, getattr(self, field), 1)
        if self.split not in get_args(Split):
            raise InvalidValue("split", self.split, "must be train, validation or test")
        if self.inner_steps is not None and self.inner_steps < 0:
            why = "must be at least 0, or null for the algorithm's own number"
            raise InvalidValue("inner_steps", self.inner_steps, why)
        for field, rates in {"adam_rates": self.adam_rates, "sgd_rates": self.sgd_rates}.items():
            if not all(rate > 0 for rate in rates):
                raise InvalidValue(field, list(rates), "must hold rates above 0")
        if not (self.adam_rates or self.sgd_rates):
            raise InvalidValue("adam_rates", "[]", "must hold a rate, or sgd_rates must")
        self.rules = [*(Rule("Adam", lr) for lr in self.adam_rates), *(Rule("SGD", lr) for lr in self.sgd_rates)]
        self.baselines, self.measures = dict(self.baseline or {}), dict(self.measure or {})

    def check(self, task: TaskDistribution) -> None:
        """Refuses baselines and measures that do not go with a task."""
        groups: dict[str, Mapping[str, EvaluationPart]] = {"baseline": self.baselines, "measure": self.measures}
        for group, parts in groups.items():
            for name, part in parts.items():
                with part_of(f"evaluation.{group}.{name}"):
                    part.check(task)

    def run(
        self,
        name: str,
        meta_layer: MetaLayer,
        make_base_layer: Callable[[], BaseLayer],
        device: torch.device,
        *,
        monitor: str = "query_loss",
    ) -> Report:
        """Judges an algorithm, by its name in the report, and its baselines.

        Args:
            make_base_layer: draws networks to train from scratch.
            monitor: the metric by which choices are made; by the query loss in a method that lacks it.
        """
        self.check(meta_layer.task)
        set_of = functools.partial(TaskSet, meta_layer.task, chunk=self.chunk)
        tasks = set_of(self.split, tasks=self.tasks, seed=self.seed)
        validation = set_of("validation", tasks=self.validation_tasks, seed=VALIDATION_SEED)
        trial = Trial(meta_layer, make_base_layer, tasks, tasks.sources(), validation, self.rules, monitor, device)
        with stage(name):
            rows, choice = self.algorithm(name, trial)
        for key, baseline in self.baselines.items():
            with stage(key):
                rows += baseline.rows(key, trial)
        found = {}
        with following(meta_layer, choice.candidate.rule):
            for key, measure in self.measures.items():
                with stage(key):
                    found[key] = measure.measure(meta_layer, self.split, choice.steps)
        compared = [row._replace(difference=difference(row, rows[0], trial.sources)) for row in rows[1:]]
        measured = {key: each for key, each in found.items() if each is not None}
        drawn = tasks.hash(), self.split, self.tasks, self.seed, self.validation_tasks
        return Report(*drawn, monitor, trial.sources, [rows[0], *compared], measured)

    def algorithm(self, name: str, trial: Trial) -> tuple[list[MethodResult], Choice]:
        """A row for each batch-norm policy; the choice under the first one holds for the others."""
        first, *others = policies(trial.meta_layer)
        choice = trial.choose(self.settings(trial, first))
        rows = [trial.row(name, trial.shown(first), choice)]
        for policy in others:
            # Each query alone, beside the support set, costs as many passes as there are queries.
            few, rule = policy == "inductive", choice.candidate.rule
            steps = choice.steps if few else max(choice.candidate.steps)
            other = setting(trial, policy, rule, steps, ends_only=few)
            same = choice._replace(candidate=other, row=other.steps.index(choice.steps))
            rows.append(trial.row(name, trial.shown(policy), same))
        return rows, choice

    def settings(self, trial: Trial, policy: BatchNormPolicy) -> Iterator[Candidate]:
        """The algorithm by its own rule and, where that is asked for, by those of conventional training."""
        layer = trial.meta_layer
        steps = layer.test_inner_steps if self.inner_steps is None else self.inner_steps
        yield setting(trial, policy, None, steps)
        tune = layer.trained_inner_steps == 0 if self.tune_rule is None else self.tune_rule
        for rule in trial.rules if tune and steps_by_rule(layer) else ():
            yield setting(trial, policy, rule, steps)


def setting(
    trial: Trial, policy: BatchNormPolicy, rule: Rule | None, steps: int, *, ends_only: bool = False
) -> Candidate:
    """The algorithm under a batch-norm policy, by its own update rule (None) or another."""
    layer = trial.meta_layer

    def judge(tasks: TaskSet) -> Metrics:
        with following(layer, rule):
            return task_values(layer, tasks, steps, device=trial.device, batch_norm=policy, ends_only=ends_only)

    counted = range(steps + 1) if layer.test_inner_steps else (0,)
    return Candidate(judge, sorted({0, steps}) if ends_only and len(counted) > 1 else counted, rule=rule)
