"""Writes the tables and the plot of text by family: nothing there is typed by hand.

`python scripts/text_members.py runs/text` collects the finished runs of the text experiments over task and seed in
results/text_members/cells.json, and draws docs/results.md from it; without a folder it draws from what was collected.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from seeds import Judged, judged_rows, mean_difference, number, over_seeds, over_tasks, parameters_of, read_runs

from mlframework.evaluation.interval import Interval
from mlframework.files import as_json, atomic, write_part

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "results" / "text_members" / "cells.json"
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "text_members.png"
BITS = "query_bits_per_character"
#: Measures of generated texts, and what the table calls them.
MEASURES = {"task_fit": "task fit", "ngram_distance": "n-gram distance", "copied_10grams": "copied 10-grams"}
FAMILIES = {"fomaml": "Meta-Gradient-Descent", "matching": "Meta-Neural-Network", "ridge": "Meta-SVM"}
#: The baseline from which the others are told apart, and real text.
FIRST, REAL = "joint, fine-tuned", "real text"

#: What a run costs, and what it was made by.
COSTS = ("outer_steps", "seconds", "parameters", "commits")

Cell = dict[str, Any]


class Runs:
    """The runs of one task distribution: rows, measures and costs by method.

    Attributes:
        rows: what each run reached.
        about: what each method cost, and by which commits it was made.
        sources: of each test task.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[Judged]] = defaultdict(list)
        self.about: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self.sources: list[list[str]] | None = None

    def add(self, run: Path, result: Mapping[str, Any]) -> None:
        """Takes what a run reached."""
        algorithm, evaluation = result["choices"]["algorithm"], result["evaluation"]
        seed = int(dict(override.split("=", 1) for override in result["overrides"])["seed"])
        self.sources = evaluation["sources"]
        own = FIRST if algorithm == "joint" else algorithm
        for row in judged_rows(evaluation, BITS, seed):
            name = own if row.method == algorithm else row.method.replace("same weights", f"weights of {algorithm}")
            self.rows[name].append(row)
        costs = {"outer_steps": result["step"], "seconds": result["seconds"], "parameters": parameters_of(run)}
        for key, value in {**costs, "commits": result["git"]["commit"]}.items():
            self.about[own][key].append(value)
        shown = {"after": own, "real": REAL, **({"before": "joint, zero-shot"} if algorithm == "joint" else {})}
        for moment, name in shown.items():
            for measure in MEASURES:
                self.about[name][measure].append(evaluation["measures"]["text_quality"][moment][measure]["mean"])

    def cells(self, task: str) -> Iterator[Cell]:
        """A cell for each method."""
        for method in dict.fromkeys([*self.rows, *self.about]):
            rows, about = self.rows.get(method, []), self.about[method]
            costs: Cell = {
                key: about[key] for key in ("outer_steps", "seconds", "parameters", "commits") if key in about
            }
            measures = {m: Interval.of(torch.tensor(about[m]))._asdict() for m in MEASURES if m in about}
            yield {"task": task, "method": method, **self.reached(rows), **costs, **measures}

    def reached(self, rows: Sequence[Judged]) -> Cell:
        """Bits per character, and how far from the first method they are."""
        if not rows:
            return {}
        steps = sorted(set.intersection(*(set(row.by_step) for row in rows)))
        means = {step: Interval.of(torch.tensor([row.by_step[step] for row in rows]))._asdict() for step in steps}
        first = self.rows[FIRST]
        return {
            "over_seeds": over_seeds(rows)._asdict(),
            "over_tasks": over_tasks(rows, self.sources)._asdict(),
            "minus_first": None if rows is first or not first else mean_difference(rows, first, self.sources)._asdict(),
            "settings": [row.setting for row in rows],
            "chosen_steps": [row.steps for row in rows],
            "tasks": len(rows[0].values),
            "by_step": means,
        }


def collect(folder: Path) -> list[Cell]:
    """A cell for each task distribution and method."""
    runs: dict[str, Runs] = defaultdict(Runs)
    for run, result in read_runs(folder):
        if "sources" not in result["evaluation"]:
            continue
        runs[result["choices"]["task"]].add(run, result)
    return [cell for task, found in sorted(runs.items()) for cell in found.cells(task)]


def table(cells: Sequence[Cell], task: str) -> Iterator[str]:
    """Lines of markdown: a row for each method, the best first."""
    columns = ["family", "bits per character", "± over seeds", "± over sources", f"minus {FIRST}", "chosen"]
    columns += [*MEASURES.values(), "outer steps", "minutes", "parameters"]
    yield f"| `{task}` | " + " | ".join(columns) + " |"
    yield "|" + " --- |" * (len(columns) + 1)
    for found in ordered(cells, task):
        reached = ["", "", "", "", ""]
        if "over_seeds" in found:
            seeds, tasks, many = found["over_seeds"], found["over_tasks"], len(found["chosen_steps"]) > 1
            reached = [
                f"{seeds['mean']:.3f}",
                f"{seeds['half_width']:.3f}" if many else "",
                "" if tasks["over_sources"] is None else f"{tasks['over_sources']:.2f}",
                number(found["minus_first"], width="over_sources"),
                chosen(found),
            ]
        measures = [number(found.get(measure)) for measure in MEASURES]
        costs = ["", "", ""]
        if "seconds" in found:
            minutes = sum(found["seconds"]) / len(found["seconds"]) / 60
            costs = [str(found["outer_steps"][0]), f"{minutes:.0f}", f"{found['parameters'][0]:,}"]
        family = FAMILIES.get(found["method"], "" if found["method"] == REAL else "baseline")
        yield f"| {found['method']} | {family} | " + " | ".join([*reached, *measures, *costs]) + " |"


def chosen(found: Cell) -> str:
    """What validation tasks chose, by seed."""
    pairs = dict.fromkeys(zip(found["settings"], found["chosen_steps"], strict=True))
    if all(pair == ("", 0) or len(found["by_step"]) == 1 for pair in pairs):
        return ""
    return "; ".join(f"{setting or 'own rule'}, {steps} steps" for setting, steps in pairs)


def ordered(cells: Sequence[Cell], task: str) -> list[Cell]:
    """The cells of a task distribution, the fewest bits first, without bits last."""
    mine = [cell for cell in cells if cell["task"] == task]
    return sorted(mine, key=lambda cell: cell["over_seeds"]["mean"] if "over_seeds" in cell else float("inf"))


def draw(cells: Sequence[Cell], tasks: Sequence[str]) -> None:
    """For each task: bits per character by method, and by inner step."""
    figure, axes = plt.subplots(2, len(tasks), figsize=(6 * len(tasks), 7), layout="constrained", squeeze=False)
    for (above, below), task in zip(axes.T, tasks, strict=True):
        shown = [cell for cell in ordered(cells, task)[::-1] if "over_seeds" in cell]
        for row, cell in enumerate(shown):
            width = cell["over_tasks"]["over_sources"] or 0.0
            colour = "tab:blue" if cell["method"] in FAMILIES else "tab:gray"
            above.errorbar(cell["over_seeds"]["mean"], row, xerr=width, fmt="o", color=colour)
        above.set_yticks(range(len(shown)), [cell["method"] for cell in shown])
        above.set(title=task, xlabel="bits per character, 95 % over sources")
        above.grid(axis="x", alpha=0.3)
        for cell in shown:
            steps = [int(step) for step in cell["by_step"]]
            if len(steps) > 2 and cell["method"] != "from scratch":
                means = [interval["mean"] for interval in cell["by_step"].values()]
                below.plot(steps, means, marker="o", label=cell["method"])
        below.set(xlabel="inner steps", ylabel="bits per character")
        below.grid(alpha=0.3)
        below.legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        with atomic(CELLS) as part:
            part.write_text(as_json(collect(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    cells = json.loads(CELLS.read_text(encoding="utf-8"))
    tasks = sorted({cell["task"] for cell in cells})
    write_part(PAGE, "scripts/text_members.py", "\n\n".join("\n".join(table(cells, task)) for task in tasks))
    draw(cells, tasks)


if __name__ == "__main__":
    main()
