"""One evaluation at work: every method chooses on the same validation tasks and is judged on the same task set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.evaluation.choices import Candidate, Choice, Rule, choose
from mlframework.evaluation.interval import Interval, Sources
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Trial"]


class Trial(NamedTuple):
    """The tasks and tools with which a method chooses its setting and is judged.

    Attributes:
        meta_layer: the trained algorithm.
        make_base_layer: draws a newly initialised base layer from torch's global generator.
        tasks: the task set on which methods are judged.
        sources: of each of these tasks; None where each task is a source of its own.
        validation: the tasks on which methods choose.
        rules: the update rules over which conventional training is tuned.
        monitor: the metric by which choices are made.
        device: where episodes go.
    """

    meta_layer: MetaLayer
    make_base_layer: Callable[[], BaseLayer]
    tasks: TaskSet
    sources: Sources | None
    validation: TaskSet
    rules: Sequence[Rule]
    monitor: str
    device: torch.device

    @property
    def task(self) -> TaskDistribution:
        return self.tasks.task

    def choose(self, candidates: Iterable[Candidate]) -> Choice:
        """The setting that does best on the validation tasks."""
        higher = self.monitor.removeprefix("query_") in self.task.higher_is_better
        return choose(candidates, self.validation, self.monitor, higher_is_better=higher)

    def row(self, method: str, batch_norm: str, choice: Choice, *, tasks: int | None = None) -> MethodResult:
        """Judges a choice on the task set, or on its first tasks.

        Args:
            method: its name in the report.
            batch_norm: the policy by which it normalised queries, or `none`.
            choice: of a setting and a number of steps.
            tasks: how many of the first tasks; None: all.
        """
        judged = self.tasks.first(tasks) if tasks else self.tasks
        sources = self.sources and self.sources[: judged.tasks]
        candidate, row, value = choice
        values = candidate.judge(judged)
        metrics = {name: [Interval.of(step, sources) for step in steps] for name, steps in values.items()}
        at_choice = {name: steps[row].tolist() for name, steps in values.items()}
        steps = tuple(candidate.steps)
        return MethodResult(
            method, batch_norm, judged.tasks, steps, metrics, candidate.setting, choice.steps, value, at_choice
        )

    def shown(self, policy: BatchNormPolicy) -> str:
        """A batch-norm policy as a report names it: `none` where the base layer does not mix examples."""
        return policy if self.meta_layer.base_layer.mixes_examples else "none"
