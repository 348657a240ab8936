"""Writes the tables and the plot of sinusoids by algorithm and shots: nothing there is typed by hand.

`python scripts/sinusoid_shots.py runs/sinusoid/runs` collects the finished runs of `scripts/tune.py` in
results/sinusoid_shots/cells.json, and draws docs/results.md from it; without a folder it draws from what was collected.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from seeds import Judged, judged_rows, mean_difference, number, over_seeds, over_tasks, parameters_of, read_runs

from mlframework.files import as_json, atomic, write_part

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "results" / "sinusoid_shots" / "cells.json"
TUNING = CELLS.parent / "tuning"
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "sinusoid_shots.png"
#: The method from which the others are told apart.
FIRST = "maml"
#: Training seeds of each method.
SEEDS = 3

Cell = dict[str, Any]


def collect(folder: Path) -> list[Cell]:
    """A cell for each method and number of shots."""
    rows: dict[tuple[int, str], list[Judged]] = defaultdict(list)
    about: dict[tuple[int, str], Cell] = defaultdict(dict)
    for run, result in read_runs(folder):
        typed = dict(override.split("=", 1) for override in result["overrides"])
        k_shot, algorithm = int(typed["task.k_shot"]), result["choices"]["algorithm"]
        for row in judged_rows(result["evaluation"], "query_loss", int(typed["seed"])):
            if row.method == algorithm:
                cost = {"outer_steps": result["step"], "parameters": parameters_of(run)}
                about[k_shot, algorithm] |= {**cost, "commit": result["git"]["commit"]}
                about[k_shot, algorithm].setdefault("seconds", []).append(result["seconds"])
            elif algorithm != FIRST:
                continue  # the baselines are those of one algorithm's runs: they do not depend on the algorithm
            rows[k_shot, row.method].append(row)
    return [cell(k_shot, found, rows[k_shot, FIRST], about[k_shot, method]) for (k_shot, method), found in rows.items()]


def cell(k_shot: int, rows: Sequence[Judged], first: Sequence[Judged], about: Cell) -> Cell:
    """What a method reached."""
    befores = [row.before for row in rows if row.before is not None]
    seconds = about.pop("seconds", [])
    return {
        "k_shot": k_shot,
        "method": rows[0].method,
        "seeds": [row.seed for row in rows],
        "chosen_steps": [row.steps for row in rows],
        "settings": [row.setting for row in rows],
        "before": sum(befores) / len(befores) if befores else None,
        "over_seeds": over_seeds(rows)._asdict(),
        "over_tasks": over_tasks(rows, None)._asdict(),
        "minus_first": None if rows[0].method == FIRST else mean_difference(rows, first, None)._asdict(),
        "seconds": sum(seconds) / len(seconds) if seconds else None,
        **about,
    }


def table(cells: Sequence[Cell], k_shot: int) -> Iterator[str]:
    """Lines of markdown: a row for each method, the best first."""
    columns = ("before", "after", "± over seeds", "± over tasks", f"minus {FIRST}", "steps", "seconds", "parameters")
    yield f"| {k_shot}-shot | " + " | ".join(columns) + " |"
    yield "|" + " --- |" * (len(columns) + 1)
    for found in ordered(cells, k_shot):
        seeds, tasks = found["over_seeds"], found["over_tasks"]
        shown = [
            "" if found["before"] is None else f"{found['before']:.2f}",
            f"{seeds['mean']:.3g}",
            "" if found["seconds"] is None or seeds["half_width"] is None else f"{seeds['half_width']:.2g}",
            f"{tasks['half_width']:.2g}",
            number(found["minus_first"]),
            steps(found),
            "" if found["seconds"] is None else f"{found['seconds']:.0f}",
            "" if found["seconds"] is None else f"{found['parameters']:,}",
        ]
        yield f"| {named(found)} | " + " | ".join(shown) + " |"


def named(found: Cell) -> str:
    """The method, with its setting where all seeds have one, and how many seeds finished where some did not."""
    settings, seeds = set(found["settings"]), len(found["seeds"])
    name = f"{found['method']}, {settings.pop()}" if len(settings) == 1 and settings != {""} else found["method"]
    return name if found["seconds"] is None or seeds == SEEDS else f"{name} ({seeds} of {SEEDS} seeds)"


def steps(found: Cell) -> str:
    """The numbers of steps that validation chose, by seed."""
    chosen = sorted(set(found["chosen_steps"]))
    return "" if chosen == [0] or found["before"] is None else ", ".join(map(str, chosen))


def ordered(cells: Sequence[Cell], k_shot: int) -> list[Cell]:
    """The cells of a number of shots, the smallest error first."""
    return sorted((c for c in cells if c["k_shot"] == k_shot), key=lambda c: c["over_seeds"]["mean"])


def tuned() -> Iterator[str]:
    """Lines of markdown: what each algorithm was tried with, and what validation chose."""
    yield "| algorithm | settings tried: loss on validation tasks |"
    yield "| --- | --- |"
    for path in sorted(TUNING.glob("*.json")):
        trials = json.loads(path.read_text(encoding="utf-8"))
        finished = [t["validation"] for t in trials if t["validation"] is not None]
        shown = []
        for trial in trials:
            value = "failed" if trial["validation"] is None else f"{trial['validation']:.3g}"
            text = f"`{trial['setting']}`: {value}"
            shown.append(f"**{text}**" if trial["validation"] == min(finished) else text)
        yield f"| {path.stem} | {'; '.join(shown)} |"


def draw(cells: Sequence[Cell]) -> None:
    """Each method's error, a colour for each number of examples."""
    shots = sorted({c["k_shot"] for c in cells})
    methods = [c["method"] for c in max((ordered(cells, k_shot) for k_shot in shots), key=len)][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(methods) + 1.2), layout="constrained")
    for index, k_shot in enumerate(shots):
        by_method = {c["method"]: c["over_seeds"] for c in ordered(cells, k_shot)}
        shown = [(row, by_method[m]) for row, m in enumerate(methods) if m in by_method]
        places = [row + 0.2 * (1 - index) for row, _ in shown]
        means, widths = ([interval[name] or 0.0 for _, interval in shown] for name in ("mean", "half_width"))
        axes.errorbar(means, places, xerr=widths, fmt="o", ms=4, label=f"{k_shot}-shot")
    axes.set(xscale="log", xlabel="query mean squared error after the chosen steps; 95 % over three seeds")
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        with atomic(CELLS) as part:
            part.write_text(as_json(collect(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    cells = json.loads(CELLS.read_text(encoding="utf-8"))
    shots = sorted({c["k_shot"] for c in cells})
    tables = ["\n".join(table(cells, k_shot)) for k_shot in shots]
    write_part(PAGE, "scripts/sinusoid_shots.py", "\n\n".join(tables))
    write_part(PAGE, "scripts/sinusoid_shots.py tuning", "\n".join(tuned()))
    draw(cells)


if __name__ == "__main__":
    main()
