"""Makes and draws the tables of docs/tables.md: nothing there is typed by hand.

`python scripts/tables.py train runs/tables` tries every algorithm with as many settings as any other, for half of the
outer steps, takes the one with the smallest loss on validation tasks, and trains it with three seeds; one run more has
the baselines. `--only maml,ridge` takes some algorithms. A repeated command goes on where it was stopped.
`python scripts/tables.py collect runs/tables` collects the finished runs in results/tables/cells.json and draws;
`python scripts/tables.py draw` draws alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seeds import Judged, judged_rows, mean_difference, number, over_seeds, over_tasks, read_runs

from mlframework.files import as_json, atomic, write_part

ROOT = Path(__file__).parents[1]
CELLS, PAGE = ROOT / "results" / "tables" / "cells.json", ROOT / "docs" / "tables.md"

#: Each experiment with its second metric, and how that is shown.
EXPERIMENTS = {
    "table_schools": ("query_absolute_error", "absolute error"),
    "table_aggression": ("query_accuracy", "accuracy"),
}
#: The settings over which algorithms are tuned, ten for each. MAML's evaluations tune the rule of the inner loop too.
OUTER = [f"optimizer.lr={lr}" for lr in (0.0001, 0.0003, 0.001, 0.003, 0.006, 0.01, 0.02, 0.03, 0.1, 0.3)]
INNER = [
    f"suggested.inner_lr={inner} optimizer.lr={lr} evaluation.tune_rule=true"
    for inner in (0.003, 0.01, 0.03, 0.1, 0.3)
    for lr in (0.003, 0.01)
]
RIDGE = [f"algorithm.reg={reg} optimizer.lr={lr}" for reg in (10, 30, 100, 300, 1000) for lr in (0.003, 0.01)]
TRIED = {"maml": INNER, "joint": OUTER, "conditional_neural_process": OUTER, "ridge": RIDGE, "prototypes": OUTER}
TUNED = ("optimizer.lr=", "suggested.inner_lr=", "algorithm.reg=")
FEWER = ["trainer.steps=500", "evaluation.tasks=1"]
SEEDS = "seed=0,1,2"
#: Kinds of tasks that an algorithm takes, where it does not take both.
CLASSIFICATIONS = ("prototypes",)
NO_BASELINES = "evaluation/baseline=[]"

Cell = dict[str, Any]


def train(folder: Path, only: Sequence[str]) -> None:
    for experiment in EXPERIMENTS:
        for algorithm, settings in TRIED.items():
            if (only and algorithm not in only) or (experiment == "table_schools" and algorithm in CLASSIFICATIONS):
                continue
            own, place = [f"experiment={experiment}", f"algorithm={algorithm}"], f"{experiment}/{algorithm}"
            for trial, setting in enumerate(settings):
                sweep(folder / "tune" / place / str(trial), *own, *setting.split(), *FEWER, "seed=0", NO_BASELINES)
            best = min(trials(folder / "tune" / place), key=lambda found: found["validation"])["setting"]
            sweep(folder / "seeds" / place, *own, *best.split(), SEEDS, NO_BASELINES)
        if not only or "baselines" in only:
            sweep(folder / "baselines" / experiment, f"experiment={experiment}", "seed=0", "trainer.steps=1")


def sweep(folder: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "mlframework.cli.train", "-m", "resume=true", "threads=1", "logger.figures=false"]
    subprocess.run([*command, *overrides, f"hydra.sweep.dir={folder}"], check=False)


def collect(folder: Path) -> list[Cell]:
    """A cell for each experiment and method."""
    return [cell for experiment in EXPERIMENTS for cell in cells_of(folder, experiment)]


def cells_of(folder: Path, experiment: str) -> Iterator[Cell]:
    metrics = ("query_loss", EXPERIMENTS[experiment][0])
    rows: dict[str, dict[str, list[Judged]]] = defaultdict(lambda: defaultdict(list))
    about: dict[str, list[dict[str, Any]]] = defaultdict(list)
    runs = [(place, run) for place in ("seeds", "baselines") for _, run in read_runs(folder / place / experiment)]
    for place, result in runs:
        algorithm, seed = result["choices"]["algorithm"], dict(o.split("=", 1) for o in result["overrides"])["seed"]
        about[algorithm] += [result] if place == "seeds" else []
        for metric in metrics:
            for row in judged_rows(result["evaluation"], metric, int(seed)):
                if (row.method == algorithm) == (place == "seeds"):
                    rows[row.method][metric].append(row)
    evaluation = runs[0][1]["evaluation"]
    references = {
        "minus_reference": best_baseline(next(run for place, run in runs if place == "baselines")),
        "minus_joint": "joint",
    }
    assert all(run["evaluation"]["task_hash"] == evaluation["task_hash"] for _, run in runs), "runs of different tasks"
    for method, (loss, second) in {method: found.values() for method, found in rows.items()}.items():
        tuned = trials(folder / "tune" / experiment / method)
        yield {
            "experiment": experiment,
            "task_hash": evaluation["task_hash"],
            "method": method,
            **judged(loss, second, [tuple(names) for names in evaluation["sources"]]),
            **{
                name: minus(loss, rows[other]["query_loss"], evaluation["sources"])
                for name, other in references.items()
            },
            **(of_training(about[method], tuned) if method in about else {}),
        }


def best_baseline(result: dict[str, Any]) -> str:
    """The baseline with the smallest loss on validation tasks: from it the others are told apart."""
    _, *baselines = result["evaluation"]["rows"]
    on_all = [row for row in baselines if row["tasks"] == result["evaluation"]["tasks"]]
    return str(min(on_all, key=lambda row: float(row["validation"]))["method"])


def minus(loss: Sequence[Judged], other: Sequence[Judged], sources: Sequence[Sequence[str]]) -> Cell | None:
    same = loss[0].method == other[0].method
    return None if same else dict(mean_difference(loss, other, sources)._asdict())


def judged(loss: Sequence[Judged], second: Sequence[Judged], sources: Sequence[tuple[str, ...]]) -> Cell:
    """What a method reached, by both metrics."""
    return {
        "tasks": len(loss[0].values),
        "settings": sorted({row.setting for row in loss}),
        "chosen_steps": [row.steps for row in loss],
        "loss": over_tasks(loss, sources)._asdict(),
        "loss_over_seeds": over_seeds(loss)._asdict(),
        "second": over_tasks(second, sources)._asdict(),
    }


def of_training(runs: Sequence[dict[str, Any]], tuned: Sequence[Cell]) -> Cell:
    """How an algorithm was tuned and trained."""
    return {
        "tuning": tuned,
        "seconds": [run["seconds"] for run in runs],
        "outer_steps": runs[0]["step"],
        "commit": runs[0]["git"]["commit"],
        "command": typed(runs[0]),
    }


def typed(result: dict[str, Any]) -> str:
    """The command of a run, but for its seed and its folder."""
    left_out = ("run_dir", "resume", "seed", "logger.figures", "hydra.sweep.dir", "evaluation/baseline")
    return " ".join(["mlframework-train", *(o for o in result["overrides"] if o.split("=")[0] not in left_out)])


def trials(folder: Path) -> list[Cell]:
    """The settings that an algorithm was tried with, and what each reached on validation tasks."""
    found = []
    for _, result in read_runs(folder):
        setting = " ".join(o for o in result["overrides"] if o.startswith(TUNED))
        found.append({"setting": setting, "validation": result["evaluation"]["rows"][0]["validation"]})
    return found


def table(cells: Sequence[Cell], experiment: str) -> Iterator[str]:
    """Lines of markdown: a row for each method, the smallest loss first."""
    chosen = sorted((c for c in cells if c["experiment"] == experiment), key=lambda c: c["loss"]["mean"])
    second = EXPERIMENTS[experiment][1]
    columns = ("loss ± over sources", "minus the reference", "minus `joint`", second, "± over seeds", "seconds")
    yield f"| {experiment} (hash `{chosen[0]['task_hash']}`) | " + " | ".join(columns) + " |"
    yield "|" + " --- |" * 7
    for cell in chosen:
        setting = f", {cell['settings'][0]}" if len(cell["settings"]) == 1 and cell["settings"][0] else ""
        few = "" if cell["tasks"] == chosen[0]["tasks"] else f" ({cell['tasks']} tasks)"
        seeds = cell["loss_over_seeds"]["half_width"]
        seconds = sum(cell["seconds"]) / len(cell["seconds"]) if cell.get("seconds") else None
        shown = [
            number(cell["loss"], width="over_sources"),
            number(cell["minus_reference"], width="over_sources") or "reference",
            number(cell["minus_joint"], width="over_sources"),
            number(cell["second"], width="over_sources"),
            "" if seeds is None or seconds is None else f"{seeds:.2g}",
            "" if seconds is None else f"{seconds:.0f}",
        ]
        name = f"**{cell['method']}**" if seconds is not None else cell["method"]
        yield f"| {name}{setting}{few} | " + " | ".join(shown) + " |"


def tuning(cells: Sequence[Cell]) -> Iterator[str]:
    """Lines of markdown: what each algorithm was tried with, and what validation chose."""
    yield "| experiment | algorithm | settings tried: loss on validation tasks | command of a seed |"
    yield "| --- | --- | --- | --- |"
    for cell in cells:
        if "tuning" in cell:
            best = min(t["validation"] for t in cell["tuning"])
            shown = [f"`{t['setting']}`: {t['validation']:.4f}" for t in cell["tuning"]]
            marked = [f"**{s}**" if t["validation"] == best else s for s, t in zip(shown, cell["tuning"], strict=True)]
            yield f"| {cell['experiment']} | {cell['method']} | {'; '.join(marked)} | `{cell['command']}` |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "collect", "draw"])
    parser.add_argument("folder", type=Path, nargs="?", help="where the runs are")
    parser.add_argument("--only", default="", help="algorithms, separated by commas; baselines: the run with these")
    asked = parser.parse_args()
    if asked.stage == "train":
        train(asked.folder, [name for name in asked.only.split(",") if name])
        return
    if asked.stage == "collect":
        with atomic(CELLS) as part:
            part.write_text(as_json(collect(asked.folder), indent=1) + "\n", encoding="utf-8")
    cells = json.loads(CELLS.read_text(encoding="utf-8"))
    for experiment in EXPERIMENTS:
        write_part(PAGE, f"scripts/tables.py {experiment}", "\n".join(table(cells, experiment)))
    write_part(PAGE, "scripts/tables.py tuning", "\n".join(tuning(cells)))


if __name__ == "__main__":
    main()
