"""The report of an evaluation: a row for each method, on one frozen set of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mlframework.episode import Split
from mlframework.evaluation.interval import Interval, Sources

__all__ = ["Measured", "MethodResult", "Report", "difference"]


class MethodResult(NamedTuple):
    """A row of a report: the metrics of one method.

    Attributes:
        method: its name.
        batch_norm: the policy by which queries were normalised; `none` where nothing mixes examples.
        tasks: the number of tasks, from the beginning of the task set.
        steps: the training steps on the support set after which the method was judged.
        metrics: each query metric's interval after each number of steps.
        setting: the choice on validation tasks, as `Adam 0.01`; empty for a method with one setting.
        chosen: the number of steps that validation tasks chose, one of `steps`.
        validation: the mean of the monitored metric on the validation tasks, at the choice.
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
        """A metric's interval after the chosen number of steps."""
        return self.metrics[metric][self.steps.index(self.chosen)]

    def to_json(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "metrics": {name: [i._asdict() for i in steps] for name, steps in self.metrics.items()},
            "values": {name: [float(f"{value:.6g}") for value in values] for name, values in self.values.items()},
            "difference": self.difference and {name: i._asdict() for name, i in self.difference.items()},
        }


class Measured(NamedTuple):
    """A table of intervals beside the rows of a report.

    Attributes:
        title: of the table.
        columns: intervals by the heading of their column and the name of their row.
    """

    title: str
    columns: Mapping[str, Mapping[str, Interval]]

    def to_json(self) -> dict[str, Any]:
        return {of: {name: i._asdict() for name, i in column.items()} for of, column in self.columns.items()}


class Report(NamedTuple):
    """An evaluation: which tasks, and a row for each method.

    Attributes:
        task_hash: sixteen hexadecimal digits; equal digits are equal tasks.
        split: which tasks were drawn.
        tasks: how many.
        seed: of the draws.
        validation_tasks: on how many tasks every method's choices were made.
        monitor: by which metric.
        sources: of each task; None where each task is a source of its own.
        rows: the trained algorithm first.
        measures: further tables, by the name of their measure.
    """

    task_hash: str
    split: Split
    tasks: int
    seed: int
    validation_tasks: int
    monitor: str
    sources: Sources | None
    rows: list[MethodResult]
    measures: Mapping[str, Measured] = {}

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; an interval is its mean, half widths and number of values."""
        measures = {name: measured.to_json() for name, measured in self.measures.items()}
        return {**self._asdict(), "rows": [row.to_json() for row in self.rows], "measures": measures}


def difference(row: MethodResult, first: MethodResult, sources: Sources | None) -> dict[str, Interval]:
    """Each metric of a row minus the first row's on the same tasks."""
    found = {}
    for name in row.values.keys() & first.values.keys():
        ours, theirs = (torch.tensor(each.values[name][: row.tasks], dtype=torch.float64) for each in (row, first))
        found[name] = Interval.of(ours - theirs, sources and sources[: row.tasks])
    return found
