"""The gap between a prior-fitted network and the exact posterior of its prior, by the number of support rows.

`python scripts/prior_gaussian_process.py runs/prior_gp` judges a run of experiment=prior_gaussian_process, writes
results/priors/gaussian_process.json, and draws the table in docs/priors.md from it; without a folder it draws from what
was written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from prior_runs import about_run, told
from seeds import number

from mlframework.evaluation.baselines.exact_posterior import scores
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.task_set import TaskSet, task_values
from mlframework.files import write_json, write_part
from mlframework.runs import load
from mlframework.tasks import TablePrior

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "priors" / "gaussian_process.json", ROOT / "docs" / "priors.md"
#: Support rows; the last number is beyond those of the training.
SUPPORT = (1, 2, 4, 8, 16, 32, 64)
TASKS, SEED = 500, 0
NETWORK, EXACT, GAP = "network", "exact posterior", "network minus exact"


def with_support(task: TablePrior, rows: int) -> TablePrior:
    """The same prior, each task with so many support rows."""
    args, keywords = task.constructor_arguments
    return TablePrior(*args, **{**keywords, "k_shot": rows})


def judged(run: str) -> Iterator[dict[str, Any]]:
    """A cell for each number of support rows: both methods on the same tasks, and their difference."""
    layer = load(run, weights="last", device="cpu").meta_layer
    assert isinstance(layer.task, TablePrior)
    prior = layer.task
    for rows in SUPPORT:
        layer.task = with_support(prior, rows)
        tasks = TaskSet(layer.task, "test", tasks=TASKS, seed=SEED)
        own = task_values(layer, tasks, 0, device=torch.device("cpu"))
        exact = [scores(layer.task, episode) for episode in tasks]
        cell: dict[str, Any] = {"support": rows, "tasks": TASKS, "seed": SEED, "hash": tasks.hash()}
        for metric in ("query_nll", "query_loss"):
            best = torch.cat([part[metric] for part in exact]).double()
            found = own[metric][0].double()
            values = {NETWORK: found, EXACT: best, GAP: found - best}
            cell[metric] = {name: Interval.of(each)._asdict() for name, each in values.items()}
        yield cell


def drawn() -> Iterator[str]:
    """The table of the page, and what it comes from."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    heads = [f"{name}: {what}" for name in ("NLL", "squared error") for what in (NETWORK, EXACT, GAP)]
    yield "| support rows | " + " | ".join(heads) + " |"
    yield "|" + " --- |" * (len(heads) + 1)
    for cell in found["cells"]:
        row = [number(cell[metric][name]) for metric in ("query_nll", "query_loss") for name in (NETWORK, EXACT, GAP)]
        yield f"| {cell['support']} | " + " | ".join(row) + " |"
    cell = found["cells"][0]
    yield ""
    yield f"{cell['tasks']} test tasks for each number of support rows, seed {cell['seed']}; 95 % intervals over tasks."
    yield f"{told(found['about'])}"


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run = sys.argv[1]
        write_json(RESULTS, {"about": about_run(run), "cells": list(judged(run))}, indent=1)
    write_part(PAGE, "scripts/prior_gaussian_process.py", "\n".join(drawn()))


if __name__ == "__main__":
    main()
