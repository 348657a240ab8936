"""Writes the table and the plot of sinusoids by algorithm and shots: nothing there is typed by hand.

`python scripts/sinusoid_shots.py multirun/<date>/<time>` collects a finished sweep of `experiment=sinusoid_shots` over
algorithm, task.k_shot and seed in results/sinusoid_shots/jobs.json, and draws docs/results.md from it; without a folder
it draws from what was collected.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch

from mlframework.files import write_json, write_part
from mlframework.judging import Interval

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "results" / "sinusoid_shots" / "jobs.json"
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "sinusoid_shots.png"
STEPS = (0, 1, 5, 10)
#: Stands for the steps of what has no inner steps, or others: a closed form, a network that emits a model, a baseline.
FITTED = -1
#: A mean squared error above this is no prediction: always predicting zero gives about 4.
DIVERGED = 30.0


class Cell(NamedTuple):
    """Where a number stands.

    Attributes:
        method: an algorithm, or a baseline.
        k_shot: examples that it adapts to.
        step: inner steps, or `FITTED`.
    """

    method: str
    k_shot: int
    step: int


def collect(sweep: Path) -> list[dict[str, Any]]:
    """What the table needs of every job of a sweep."""
    jobs = []
    for path in sorted(sweep.rglob("result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        typed = dict(override.split("=", 1) for override in result["overrides"])
        for row in result["evaluation"]["rows"]:
            losses = [interval["mean"] for interval in row["metrics"]["query_loss"]]
            named = {"method": row["method"], "k_shot": int(typed["task.k_shot"]), "seed": int(typed["seed"])}
            jobs.append({**named, "tasks": row["tasks"], "steps": row["steps"], "losses": losses})
    return jobs


def cells(jobs: list[dict[str, Any]]) -> dict[Cell, Interval]:
    """Each cell's interval over the seeds."""
    values: dict[Cell, list[float]] = defaultdict(list)
    for job in jobs:
        reached = [math.inf if loss is None else loss for loss in job["losses"]]  # a diverged loss is null in JSON
        losses = dict(zip(job["steps"], reached, strict=True))
        shown = {step: losses[step] for step in STEPS} if STEPS[-1] in losses else {FITTED: reached[-1]}
        for step, loss in shown.items():
            values[Cell(job["method"], job["k_shot"], step)].append(loss)
    return {cell: Interval.of(torch.tensor(found)) for cell, found in values.items()}


def table(found: dict[Cell, Interval], k_shot: int) -> Iterator[str]:
    """Lines of markdown: a row for each method, the best first, and a column for each number of steps."""
    columns = (*STEPS, FITTED)
    steps = [f"{step} step{'' if step == 1 else 's'}" for step in STEPS]
    yield f"| {k_shot}-shot | " + " | ".join([*steps, "fitted"]) + " |"
    yield "|" + " --- |" * (len(columns) + 1)
    for method in methods_of(found, k_shot):
        intervals = [found.get(Cell(method, k_shot, column)) for column in columns]
        yield f"| {method} | " + " | ".join(number(interval) if interval else "" for interval in intervals) + " |"


def number(interval: Interval) -> str:
    """A mean and half a 95 % interval; what is no number, or too large to mean one, has diverged for some seed."""
    if not interval.mean < DIVERGED:
        return "diverges"
    digits = 3 if interval.mean < 0.1 else 2
    return f"{interval.mean:.{digits}f} ± {interval.half_width:.{digits}f}"


def shots_of(found: dict[Cell, Interval]) -> list[int]:
    return sorted({cell.k_shot for cell in found})


def methods_of(found: dict[Cell, Interval], k_shot: int) -> list[str]:
    """The methods, the one with the smallest error first."""
    return sorted({cell.method for cell in found}, key=lambda method: best(found, method, k_shot).mean)


def best(found: dict[Cell, Interval], method: str, k_shot: int) -> Interval:
    """A method's smallest error over its steps."""
    intervals = [interval for cell, interval in found.items() if cell[:2] == (method, k_shot)]
    return min((interval for interval in intervals if interval.mean < DIVERGED), key=lambda interval: interval.mean)


def draw(found: dict[Cell, Interval]) -> None:
    """Each method's smallest error, a colour for each number of examples."""
    methods = methods_of(found, shots_of(found)[-1])[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(methods) + 1.2), layout="constrained")
    for index, k_shot in enumerate(shots_of(found)):
        places = [row + 0.2 * (1 - index) for row in range(len(methods))]
        means, widths, *_ = zip(*(best(found, method, k_shot) for method in methods), strict=True)
        axes.errorbar(means, places, xerr=widths, fmt="o", ms=4, label=f"{k_shot}-shot")
    axes.set(xscale="log", xlim=(0.004, 10), xlabel="query mean squared error after the best number of steps")
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        write_json(JOBS, collect(Path(sys.argv[1])), indent=None)
    found = cells(json.loads(JOBS.read_text(encoding="utf-8")))
    write_part(
        PAGE, "scripts/sinusoid_shots.py", "\n\n".join("\n".join(table(found, k_shot)) for k_shot in shots_of(found))
    )
    draw(found)


if __name__ == "__main__":
    main()
