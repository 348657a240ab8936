"""Writes the tables and the plot of text by family: nothing there is typed by hand.

`python scripts/text_members.py multirun/<date>/<time>` collects a finished sweep of the text experiments over task and
seed in results/text_members/jobs.json, and draws docs/results.md from it; without a folder it draws from what was
collected.
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
JOBS = ROOT / "results" / "text_members" / "jobs.json"
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "text_members.png"
BITS = "query_bits_per_character"
#: Measures of generated texts, and what the table calls them.
MEASURES = {"task_fit": "task fit", "ngram_distance": "n-gram distance", "copied_10grams": "copied 10-grams"}
FAMILIES = {
    "fomaml": "Meta-Gradient-Descent",
    "matching": "Meta-Neural-Network",
    "ridge": "Meta-SVM",
}
REAL = "real text"


class Cell(NamedTuple):
    """Where a number stands.

    Attributes:
        task: the task distribution.
        method: an algorithm, or a baseline.
        column: what was measured; a number: bits per character after so many inner steps.
    """

    task: str
    method: str
    column: str | int


def collect(sweep: Path) -> list[dict[str, Any]]:
    """What the tables need of every job of a sweep."""
    jobs = []
    for path in sorted(sweep.rglob("result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        evaluation, seed = result["evaluation"], dict(o.split("=", 1) for o in result["overrides"])["seed"]
        bits = {row["method"]: [interval["mean"] for interval in row["metrics"][BITS]] for row in evaluation["rows"]}
        quality = {
            moment: {name: interval["mean"] for name, interval in measures.items()}
            for moment, measures in evaluation["quality"].items()
            if measures
        }
        named = {"task": result["choices"]["task"], "algorithm": result["choices"]["algorithm"], "seed": int(seed)}
        counted = {"tasks": evaluation["tasks"], "hash": evaluation["task_hash"], "seconds": result["seconds"]}
        jobs.append({**named, **counted, "bits": bits, "quality": quality})
    return jobs


def values(job: dict[str, Any]) -> Iterator[tuple[Cell, float]]:
    """Each number of a job, and where it stands."""
    task, algorithm = job["task"], job["algorithm"]
    last = f"{algorithm}, fine-tuned" if algorithm == "joint" else algorithm
    for method, reached in job["bits"].items():
        bits = [math.inf if value is None else value for value in reached]  # a diverged value is null in JSON
        ours = method == algorithm
        name = last if ours else method.replace("same weights", f"weights of {algorithm}")
        yield Cell(task, name, "bits"), min(bits)
        if ours and len(bits) > 1:
            for step, value in enumerate(bits):
                yield Cell(task, name, step), value
        if algorithm == "joint" and ours:
            yield Cell(task, "joint, zero-shot", "bits"), bits[0]
    yield Cell(task, last, "minutes"), job["seconds"] / 60
    shown = {"after": last, "real": REAL, **({"before": "joint, zero-shot"} if algorithm == "joint" else {})}
    for moment, name in shown.items():
        for measure in MEASURES:
            value = job["quality"][moment][measure]
            yield Cell(task, name, measure), math.nan if value is None else value


def cells(jobs: list[dict[str, Any]]) -> dict[Cell, Interval]:
    """Each cell's interval over the seeds."""
    found: dict[Cell, list[float]] = defaultdict(list)
    for job in jobs:
        for cell, value in values(job):
            found[cell].append(value)
    return {cell: Interval.of(torch.tensor(numbers)) for cell, numbers in found.items()}


def methods_of(found: dict[Cell, Interval], task: str) -> list[str]:
    """The methods that were judged on a task, the one with the fewest bits first."""
    methods = [cell.method for cell in found if cell.task == task and cell.column == "bits"]
    return sorted(methods, key=lambda method: found[Cell(task, method, "bits")].mean)


def table(found: dict[Cell, Interval], task: str) -> Iterator[str]:
    """Lines of markdown: a row for each method, the best first, and one for real text."""
    yield f"| `{task}` | family | bits per character | {' | '.join(MEASURES.values())} | minutes |"
    yield "|" + " --- |" * (len(MEASURES) + 4)
    for method in [*methods_of(found, task), REAL]:
        digits = {"bits": 3, **dict.fromkeys(MEASURES, 2), "minutes": 0}
        shown = [number(found.get(Cell(task, method, column)), places) for column, places in digits.items()]
        family = FAMILIES.get(method, "" if method == REAL else "baseline")
        yield f"| {method} | {family} | " + " | ".join(shown) + " |"


def number(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    if not math.isfinite(interval.mean):
        return "diverges"
    if not digits:
        return f"{interval.mean:.0f}"
    return f"{interval.mean:.{digits}f} ± {interval.half_width:.{digits}f}"


def draw(found: dict[Cell, Interval], tasks: list[str]) -> None:
    """For each task: bits per character by method, and by inner step."""
    figure, axes = plt.subplots(2, len(tasks), figsize=(6 * len(tasks), 7), layout="constrained", squeeze=False)
    for (above, below), task in zip(axes.T, tasks, strict=True):
        methods = methods_of(found, task)[::-1]
        for row, method in enumerate(methods):
            mean, width, *_ = found[Cell(task, method, "bits")]
            colour = "tab:blue" if method in FAMILIES else "tab:gray"
            above.errorbar(mean, row, xerr=width, fmt="o", color=colour)
        above.set_yticks(range(len(methods)), methods)
        above.set(title=task, xlabel="bits per character after adapting; gray: baselines")
        above.grid(axis="x", alpha=0.3)
        for method in methods:
            steps = sorted(c.column for c in found if c[:2] == (task, method) and isinstance(c.column, int))
            if steps:
                means, widths, *_ = zip(*(found[Cell(task, method, step)] for step in steps), strict=True)
                below.errorbar(steps, means, yerr=widths, marker="o", label=method)
        below.set(xlabel="inner steps", ylabel="bits per character")
        below.grid(alpha=0.3)
        below.legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        write_json(JOBS, collect(Path(sys.argv[1])), indent=1)
    jobs = json.loads(JOBS.read_text(encoding="utf-8"))
    found, tasks = cells(jobs), sorted({job["task"] for job in jobs})
    write_part(PAGE, "scripts/text_members.py", "\n\n".join("\n".join(table(found, task)) for task in tasks))
    draw(found, tasks)


if __name__ == "__main__":
    main()
