"""What the tables of docs/results.md share: runs of several training seeds, by method, on the same tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlframework.evaluation.interval import Interval
from mlframework.evaluation.number_format import shown_interval

__all__ = [
    "Judged",
    "judged_rows",
    "mean_difference",
    "number",
    "over_seeds",
    "over_tasks",
    "parameters_of",
    "read_runs",
]


class Judged(NamedTuple):
    """A row of one run's evaluation, at the setting and the steps that validation tasks chose.

    Attributes:
        method: its name.
        seed: of the training.
        setting: the choice; empty for a method with one setting.
        steps: how many were chosen.
        before: the mean before any step; None for a method without.
        by_step: the mean after each number of steps.
        values: of each task.
    """

    method: str
    seed: int
    setting: str
    steps: int
    before: float | None
    by_step: Mapping[int, float]
    values: Sequence[float]


def read_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the result of each finished run below a folder; an evaluation of its own replaces the result's."""
    for path in sorted(folder.rglob("result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        later = path.parent / "evaluation.json"
        if later.exists():
            result["evaluation"] = json.loads(later.read_text(encoding="utf-8"))
        environment = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))
        yield path.parent, {"git": environment["git"], **result}


def judged_rows(evaluation: Mapping[str, Any], metric: str, seed: int) -> Iterator[Judged]:
    """The rows of an evaluation; of a method under several policies the first, by which it was trained."""
    seen = set()
    for row in evaluation["rows"]:
        if metric in row["metrics"] and row["method"] not in seen:
            seen.add(row["method"])
            means = [interval["mean"] for interval in row["metrics"][metric]]
            by_step = {step: mean for step, mean in zip(row["steps"], means, strict=True) if mean is not None}
            before = means[0] if len(means) > 1 else None
            yield Judged(row["method"], seed, row["setting"], row["chosen"], before, by_step, row["values"][metric])


def over_seeds(rows: Sequence[Judged]) -> Interval:
    """The mean over runs, with the interval over training seeds."""
    return Interval.of(torch.tensor([row.values for row in rows], dtype=torch.float64).mean(1))


def over_tasks(rows: Sequence[Judged], sources: Sequence[Sequence[str]] | None) -> Interval:
    """The mean over runs, with the intervals over tasks and over sources of each task's mean over seeds."""
    return Interval.of(mean_values(rows), sources_of(sources, len(rows[0].values)))


def mean_difference(
    rows: Sequence[Judged], others: Sequence[Judged], sources: Sequence[Sequence[str]] | None
) -> Interval:
    """Rows minus others, paired by task, over the tasks on which both were judged."""
    ours, theirs = mean_values(rows), mean_values(others)
    count = min(len(ours), len(theirs))
    return Interval.of(ours[:count] - theirs[:count], sources_of(sources, count))


def mean_values(rows: Sequence[Judged]) -> torch.Tensor:
    """Each task's mean over seeds, `[tasks]`."""
    return torch.tensor([row.values for row in rows], dtype=torch.float64).mean(0)


def sources_of(sources: Sequence[Sequence[str]] | None, count: int) -> list[tuple[str, ...]] | None:
    return None if sources is None else [tuple(task) for task in sources[:count]]


def parameters_of(run: Path) -> int:
    """How many numbers a run's best weights are."""
    import safetensors

    with safetensors.safe_open(run / "checkpoints" / "best.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - it is no mapping


def number(interval: Mapping[str, Any] | None, *, width: str = "half_width") -> str:
    """A stored interval, with one of its half widths."""
    return "" if interval is None else shown_interval(interval["mean"], interval[width])
