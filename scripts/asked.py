"""Trains two runs, evaluates each on other tasks than its own, and draws the tables of docs/results.md.

`python scripts/asked.py run` trains what is missing into runs/asked and evaluates what results/asked lacks; without an
argument the page is drawn from results/asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mlframework.evaluation.number_format import shown_interval
from mlframework.files import write_json, write_part
from mlframework.runs.board import machine
from mlframework.runs.git_state import git_state
from mlframework.runs.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RUNS, KEPT, PAGE = ROOT / "runs" / "asked", ROOT / "results" / "asked", ROOT / "docs" / "results.md"

TRAININGS = {
    "glyphs": "task=glyphs algorithm=prototypes trainer.steps=400 trainer.meta_batch=8 trainer.validate_every=100",
    "ratings": "task=ratings algorithm=ridge_shared_head task.held_out_items=0.2 task.held_out_ratings=0.2 "
    "trainer.steps=300 trainer.validate_every=50",
}
QUIET = "evaluation=none logger.figures=false threads=1"
IMAGES = "evaluation.tasks=200 evaluation.validation_tasks=30 evaluation/baseline=[scikit_learn]"


class Asked(NamedTuple):
    """One command: the run, its overrides, and what its table shows."""

    run: str
    typed: str
    title: str


COMMANDS = {
    "domains": Asked("glyphs", f"task=glyphs,omniglot {IMAGES}", "Another domain"),
    "shots": Asked("glyphs", f"task.k_shot=1,2,5,10 {IMAGES}", "Other shots"),
    "ways": Asked("glyphs", f"task.n_way=2,5,10,20 {IMAGES}", "Other numbers of classes"),
    "all": Asked(
        "glyphs", f"task=omniglot task.n_way=5,20 task.k_shot=1,5 {IMAGES}", "Another domain, other shots and classes"
    ),
    "partitions": Asked(
        "ratings",
        "task.users=new,existing task.items=existing,new evaluation.tasks=300 evaluation.validation_tasks=50 "
        "evaluation/baseline=[rating_means]",
        "Other partitions of users and items",
    ),
}


def command(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"mlframework.cli.{name}", *arguments], cwd=ROOT, check=True)


def run() -> None:
    """Trains and evaluates what is missing; what an evaluation wrote goes to results/asked."""
    for name, typed in TRAININGS.items():
        if not (RUNS / name / "result.json").exists():
            resume = ["resume=true"] if (RUNS / name / "config.yaml").exists() else []
            command("train", *typed.split(), *QUIET.split(), f"run_dir=runs/asked/{name}", *resume)
    for name, asked in COMMANDS.items():
        if not (KEPT / f"{name}.json").exists():
            commit, folder = git_state(), RUNS / asked.run / "evaluations"
            before = set(folder.glob("*.json"))
            command("evaluate", f"run=runs/asked/{asked.run}", *asked.typed.split())
            new = sorted(set(folder.glob("*.json")) - before, key=lambda path: int(path.name.split("_")[0]))
            reports = [without_values(json.loads(path.read_text(encoding="utf-8"))) for path in new]
            record = RunFolder(RUNS / asked.run)
            about = {"git": commit, "machine": machine(), "training": record.read_result()["git"]}
            about |= {"seed": record.config().seed, "monitor": record.config().trainer.monitor}
            write_json(KEPT / f"{name}.json", {**about, "command": shown_command(asked), "reports": reports})


def without_values(report: dict[str, Any]) -> dict[str, Any]:
    """A report without the values of single tasks, which its hash stands for."""
    del report["sources"]
    for row in report["rows"]:
        del row["values"]
    return report


def shown_command(asked: Asked) -> str:
    return f"mlframework-evaluate run=runs/asked/{asked.run} {asked.typed}"


def table(content: dict[str, Any]) -> str:
    """A markdown table: a row for each combination, a column for each method."""
    reports, metric = content["reports"], content["monitor"]
    chosen = [[each for each in report["overrides"] if each.startswith("task")] for report in reports]
    methods = list(dict.fromkeys(name_of(row) for report in reports for row in report["rows"]))
    lines = ["| tasks | hash | " + " | ".join(methods) + " |", "| --- " * (2 + len(methods)) + "|"]
    for report, typed in zip(reports, chosen, strict=True):
        cells = {name_of(row): cell(row, metric) for row in report["rows"]}
        settings = f"`{' '.join(typed)}`"
        lines.append(
            f"| {settings} | `{report['task_hash']}` | " + " | ".join(cells.get(m, "") for m in methods) + " |"
        )
    return "\n".join(lines)


def cell(row: dict[str, Any], metric: str) -> str:
    found = row["metrics"][metric][row["steps"].index(row["chosen"])]
    return shown_interval(found["mean"], found["over_sources"] or found["half_width"])


def name_of(row: dict[str, Any]) -> str:
    return row["method"] if row["batch_norm"] == "none" else f"{row['method']} ({row['batch_norm']})"


def draw() -> None:
    """Draws the page's part."""
    parts = [f"`mlframework-train {typed} run_dir=runs/asked/{name}`" for name, typed in TRAININGS.items()]
    parts = ["Two trainings with seed 0:", "\n".join(f"* {part}" for part in parts)]
    for name, asked in COMMANDS.items():
        if (KEPT / f"{name}.json").exists():
            content = json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))
            first, metric = content["reports"][0], content["monitor"].replace("_", " ")
            drawn = f"{metric.capitalize()} on {first['tasks']} {first['split']} tasks each, seed {first['seed']}"
            made = f"commit {content['git']['commit'][:10]}, {content['machine']}"
            parts += [f"**{asked.title}.** `{content['command']}`", table(content), f"{drawn}; {made}."]
    write_part(PAGE, "scripts/asked.py", "\n\n".join(parts))


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    draw()
