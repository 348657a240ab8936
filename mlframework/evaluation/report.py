"""The report of an evaluation: a row for each method, on one frozen set of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mlframework.episode import Split
from mlframework.evaluation.interval import Interval, Sources

__all__ = ["Measured", "MethodResult", "Report", "difference"]


class MethodResult(NamedTuple):
    """A row of a report: the metrics of one method."""

    method: str
    batch_norm: str  # the policy by which queries were normalised; `none` where nothing mixes examples
    tasks: int  # how many, from the beginning of the task set
    steps: tuple[int, ...]  # training steps on the support set after which the method was judged
    metrics: dict[str, list[Interval]]  # each query metric's interval after each number of steps
    setting: str  # the choice on validation tasks, as `Adam 0.01`; empty for a method with one setting
    chosen: int  # the number of steps that validation tasks chose, one of `steps`
    validation: float  # the mean on the validation tasks, at the choice, of the metric by which it was made
    values: dict[str, list[float]]  # each query metric of every task after `chosen` steps
    difference: dict[str, Interval] | None = None  # each metric minus the first row's, paired; None in the first row

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
    """A table of intervals beside the rows of a report."""

    title: str
    columns: Mapping[str, Mapping[str, Interval]]  # by the heading of the column and the name of the row

    def to_json(self) -> dict[str, Any]:
        return {of: {name: i._asdict() for name, i in column.items()} for of, column in self.columns.items()}


class Report(NamedTuple):
    """An evaluation: which tasks, and a row for each method."""

    task_hash: str  # sixteen hexadecimal digits; equal digits are equal tasks
    split: Split
    tasks: int
    seed: int  # of the draws
    validation_tasks: int  # on how many tasks every method's choices were made
    monitor: str  # by which metric; by the query loss in a method that lacks it
    sources: Sources | None  # of each task; None where each task is a source of its own
    rows: list[MethodResult]  # the trained algorithm first
    measures: Mapping[str, Measured] = {}  # further tables, by the name of their measure

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
