"""Tunes every method of a table alike, then trains the table's runs with what validation chose.

`python scripts/tune.py sinusoid_shots tune runs/sinusoid` trains each algorithm with as many settings as any other, for
half of the table's outer steps, and takes the one whose evaluation is best on the validation tasks. Nothing reads test
tasks. `results/sinusoid_shots/tuning/` holds every trial.

`python scripts/tune.py sinusoid_shots train runs/sinusoid` then trains the table's runs. `--only maml,fomaml` takes
some of the algorithms, so that several processes can share the work. A repeated command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlframework.files import as_json, atomic
from mlframework.runs.overrides import identity
from mlframework.runs.sweep_table import read_rows

ROOT = Path(__file__).parents[1]

#: Settings in which one algorithm is tried, each as overrides.
Trials = Sequence[str]

INNER = [f"algorithm.inner_steps={steps} suggested.inner_lr={lr}" for steps in (1, 5) for lr in (0.01, 0.03)]
#: Rates that are learned move by the outer rate: of two of these, the larger makes five steps diverge.
LEARNED = [f"algorithm.inner_steps={steps} optimizer.lr={lr}" for steps in (1, 5) for lr in (0.001, 0.003)]
CONTEXT = [f"algorithm.inner_steps={steps} algorithm.update.lr={lr}" for steps in (1, 5) for lr in (0.3, 1.0)]
OUTER = [f"optimizer.lr={lr}" for lr in (0.001, 0.003, 0.006, 0.01)]

#: Training from scratch is the same whatever was tuned.
NO_SCRATCH = "~evaluation.baseline.from_scratch"


class Table(NamedTuple):
    """How the runs of a table are tuned and trained.

    Attributes:
        trials: each algorithm's settings, as many for each.
        tuned_at: what a trial has beside its setting.
        runs: what the table's runs have: the axes of a sweep.
    """

    trials: Mapping[str, Trials]
    tuned_at: Sequence[str]
    runs: Sequence[str]


TABLES = {
    "sinusoid_shots": Table(
        trials={
            **dict.fromkeys(("maml", "fomaml", "anil", "boil", "lora", "learned_update"), INNER),
            **dict.fromkeys(("meta_sgd", "meta_curvature"), LEARNED),
            # With one inner step MAML++ would be MAML with learned rates: its other parts need several.
            "maml_plus_plus": [
                f"algorithm.inner_steps=5 optimizer.lr={outer} suggested.inner_lr={inner}"
                for outer in (0.0003, 0.001)
                for inner in (0.01, 0.03)
            ],
            "reptile": [
                "algorithm.inner_steps=5",
                "algorithm.inner_steps=32",
                "algorithm.inner_steps=32 algorithm/update=sgd suggested.inner_lr=0.02",
                "algorithm.inner_steps=32 algorithm/update=sgd suggested.inner_lr=0.05",
            ],
            "imaml": [f"algorithm.update.strength={s} optimizer.lr={lr}" for s in (0.5, 2.0) for lr in (0.001, 0.003)],
            "cavia": CONTEXT,
            "cavia_film": CONTEXT,
            **dict.fromkeys(("joint", "conditional_neural_process", "hypernetwork", "matching", "matching_fce"), OUTER),
            **dict.fromkeys(("meta_networks", "ridge"), OUTER),
        },
        tuned_at=["task.k_shot=10", "seed=0", "trainer.steps=1000", "evaluation.tasks=1", NO_SCRATCH],
        runs=["task.k_shot=5,10,20", "seed=0,1,2", NO_SCRATCH],
    ),
}


def command(table: str, folder: Path, *overrides: str) -> list[str]:
    """A sweep into a folder, which goes on where it was stopped."""
    train = [sys.executable, "-m", "mlframework.cli.train", "-m", f"experiment={table}", "resume=true"]
    return [*train, "logger.figures=false", *overrides, f"hydra.sweep.dir={folder}"]


def tune(table: str, algorithm: str, folder: Path) -> list[dict[str, Any]]:
    """Trains an algorithm with each of its settings; each with the metric of its evaluation's validation tasks."""
    found = []
    for number, setting in enumerate(TABLES[table].trials[algorithm]):
        place = folder / "tuning" / algorithm / str(number)
        overrides = [f"algorithm={algorithm}", *setting.split(), *TABLES[table].tuned_at]
        subprocess.run(command(table, place, *overrides), check=False)
        asked = identity([f"experiment={table}", "logger.figures=false", *overrides])
        row = next((row for row in read_rows(place) if row.identity == asked and row.status == "finished"), None)
        record = row and json.loads((place / row.job / "result.json").read_text(encoding="utf-8"))
        value = record and record["evaluation"]["rows"][0]["validation"]
        found.append({"setting": setting, "validation": value, "commit": row and commit(place / row.job)})
    return found


def commit(run: Path) -> str:
    """The commit that a run was made with."""
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return str(environment["git"]["commit"])


def chosen(trials: Sequence[Mapping[str, Any]]) -> str:
    """The setting with the smallest validation metric; a trial that failed has none."""
    finished = [trial for trial in trials if trial["validation"] is not None]
    return str(min(finished, key=lambda trial: trial["validation"])["setting"])


def tuning_file(table: str, algorithm: str) -> Path:
    """Where the trials of an algorithm are kept."""
    return ROOT / "results" / table / "tuning" / f"{algorithm}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("stage", choices=["tune", "train"])
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--only", help="algorithms, separated by commas")
    asked = parser.parse_args()
    table = TABLES[asked.table]
    for algorithm in asked.only.split(",") if asked.only else table.trials:
        if asked.stage == "tune":
            with atomic(tuning_file(asked.table, algorithm)) as part:
                part.write_text(as_json(tune(asked.table, algorithm, asked.folder), indent=1) + "\n", encoding="utf-8")
            continue
        trials = json.loads(tuning_file(asked.table, algorithm).read_text(encoding="utf-8"))
        overrides = [f"algorithm={algorithm}", *chosen(trials).split(), *table.runs]
        subprocess.run(command(asked.table, asked.folder / "runs" / algorithm, *overrides), check=False)


if __name__ == "__main__":
    main()
