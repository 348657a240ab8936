"""Every method's settings are chosen alike, on the same validation tasks, and judged alike, on the same task set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Params
from mlframework.errors import FailedRun
from mlframework.evaluation.interval import Interval, Sources
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet, over_ranks
from mlframework.inner_loop import SGD, Adam, InnerUpdate
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics
from mlframework.screen import stage
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Candidate", "Choice", "Rule", "Trial", "following", "steps_by_rule", "thinned"]


class Rule(NamedTuple):
    """An update rule, by the name of its optimizer, with its rate."""

    name: str
    lr: float

    def __str__(self) -> str:
        return f"{self.name} {self.lr:g}"

    def update(self, params: Params) -> InnerUpdate:
        return (Adam if self.name == "Adam" else SGD)(params, self.lr)


class Candidate(NamedTuple):
    """One setting of a method."""

    judge: Callable[[TaskSet], Metrics]  # gives each query metric of every task of a set [steps, tasks]
    steps: Sequence[int]  # training steps on the support set to which the rows of these metrics belong
    named: str = ""  # the setting in words; empty where the method has only one
    rule: Rule | None = None  # the update rule; None: the method's own, or none

    @property
    def setting(self) -> str:
        return str(self.rule) if self.rule else self.named


class Choice(NamedTuple):
    """The setting and the row of its `steps` that did best on validation tasks, and the mean of the metric there."""

    candidate: Candidate
    row: int
    value: float

    @property
    def steps(self) -> int:
        return self.candidate.steps[self.row]


class Trial(NamedTuple):
    """One evaluation at work: the tasks and tools with which a method chooses its setting and is judged."""

    meta_layer: MetaLayer  # the trained algorithm
    make_base_layer: Callable[[], BaseLayer]  # draws a newly initialised one from torch's global generator
    tasks: TaskSet  # on which methods are judged
    sources: Sources | None  # of each of these tasks; None where each task is a source of its own
    validation: TaskSet  # on which methods choose
    rules: Sequence[Rule]  # over which conventional training is tuned
    monitor: str  # the metric by which choices are made, of methods that have it
    device: torch.device  # where episodes go

    @property
    def task(self) -> TaskDistribution:
        return self.tasks.task

    def choose(self, candidates: Iterable[Candidate]) -> Choice:
        """Judges every setting on the validation tasks and takes the best one at its best number of steps.

        A method whose predictions lack the monitored metric, as a likelihood, chooses by the query loss. Values that
        are not finite are never the best; of equal ones the first wins.

        Raises:
            FailedRun: no setting has a finite value.
        """
        best, metric = None, self.monitor
        with stage("choosing") as at:
            for candidate in candidates:
                at.note = candidate.setting
                values = over_ranks(candidate.judge, self.validation)
                metric = self.monitor if self.monitor in values else "query_loss"
                higher_is_better = metric.removeprefix("query_") in self.task.higher_is_better
                for row, value in enumerate(values[metric].double().mean(1).tolist()):
                    better = best is None or (value > best.value if higher_is_better else value < best.value)
                    if math.isfinite(value) and better:
                        best = Choice(candidate, row, value)
        if best is None:
            raise FailedRun(f"no setting has a finite {metric} on the {self.validation.split} tasks")
        return best

    def row(self, method: str, batch_norm: str, choice: Choice, *, tasks: int | None = None) -> MethodResult:
        """Judges a choice on the task set, or on its first `tasks`; `batch_norm` is the policy, or `none`."""
        judged = self.tasks.first(tasks) if tasks else self.tasks
        sources = self.sources and self.sources[: judged.tasks]
        candidate, row, value = choice
        values = over_ranks(candidate.judge, judged)
        metrics = {name: [Interval.of(step, sources) for step in steps] for name, steps in values.items()}
        at_choice = {name: steps[row].tolist() for name, steps in values.items()}
        steps = tuple(candidate.steps)
        return MethodResult(
            method, batch_norm, judged.tasks, steps, metrics, candidate.setting, choice.steps, value, at_choice
        )

    def shown(self, policy: BatchNormPolicy) -> str:
        """A batch-norm policy as a report names it: `none` where the base layer does not mix examples."""
        return policy if self.meta_layer.base_layer.mixes_examples else "none"


def steps_by_rule(meta_layer: MetaLayer) -> bool:
    """True if the inner loop of an algorithm follows an update rule that another rule can replace."""
    return hasattr(meta_layer, "update") and hasattr(meta_layer, "adapted_names")


@contextmanager
def following(meta_layer: MetaLayer, rule: Rule | None) -> Iterator[None]:
    """Lets an inner loop follow another update rule for a while; None: its own."""
    if rule is None:
        yield
        return
    stepping: Any = meta_layer
    own = stepping.update
    params = {name: meta_layer.base_layer.get_parameter(name).detach() for name in stepping.adapted_names}
    stepping.update = rule.update(params).to(next(iter(params.values())).device)
    try:
        yield
    finally:
        stepping.update = own


def thinned(steps: int) -> list[int]:
    """0, 1, 2, 5, 10, 20, 50, ... and the last: the numbers of steps among which one is chosen.

    >>> thinned(100), thinned(30), thinned(1)
    ([0, 1, 2, 5, 10, 20, 50, 100], [0, 1, 2, 5, 10, 20, 30], [0, 1])
    """
    marks = (digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5))
    return [0, *(mark for mark in marks if mark < steps), steps]
