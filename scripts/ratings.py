"""Trains the runs of docs/ratings.md, and draws its tables: nothing there is typed by hand.

`python scripts/ratings.py train runs/ratings --seeds 3` trains every method with the seeds 0 to 2, each its own
split, and with several outer rates. A repeated command, with more seeds too, goes on where it was stopped.
`--only maml,anil` takes some methods. `python scripts/ratings.py tables runs/ratings` takes for each seed the rate that
is best on its validation tasks, and writes the records to results/ratings/ and the tables to the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlframework.evaluation.interval import Interval
from mlframework.evaluation.number_format import shown_interval
from mlframework.files import write_json, write_part
from mlframework.runs.sweep_table import read_rows

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "ratings"

#: What all runs have in common: MovieLens-100K under the protocol of RecBole-MetaRec.
COMMON = [
    *("task=ratings", "task/source=recbole", "task.split_seed=${seed}", "task.loss=absolute"),
    *("trainer.steps=400", "trainer.validate_every=50", "trainer.validation_tasks=100", "evaluation.tasks=300"),
    *("display=[]", "logger.figures=false"),
]
NO_BASELINES = "evaluation/baseline=[]"
MEANS_AND_REGRESSIONS = "evaluation/baseline=[rating_means,on_each_user]"
#: The outer rates that every method is tried with: Adam's, and the share of Reptile's step.
RATES = ["0.001", "0.003", "0.01"]
OTHER_RATES = {"reptile": ["0.3", "0.6", "1.0"]}
#: Of a run whose baselines alone are wanted.
BASELINES_ALONE = ["algorithm=ridge", "trainer.steps=1"]
#: The sweeps of baselines; where two have a method, the later one counts.
BASELINES = {
    "baselines": "evaluation/baseline=[rating_means,popularity,on_all_users,matrix_factorisation]",
    "baselines_on_each_user": "evaluation/baseline=[on_each_user]",
}

#: Every method by its name in the table, with its overrides.
METHODS: dict[str, list[str]] = {
    "ridge_shared_head": ["algorithm=ridge_shared_head"],
    "anil": ["algorithm=anil"],
    "conditional_neural_process": ["algorithm=conditional_neural_process"],
    "hypernetwork": ["algorithm=hypernetwork"],
    "ridge": ["algorithm=ridge"],
    "melu": ["algorithm=fomaml", "algorithm.adapts='^features\\.[1-9]|^head'"],
    "fomaml": ["algorithm=fomaml"],
    "maml": ["algorithm=maml"],
    "joint": ["algorithm=joint"],
    "ridge_rbf": ["algorithm=ridge_shared_head", "algorithm/kernel=rbf"],
    "matching": ["algorithm=matching"],
    "in_context": ["algorithm=in_context"],
    "deep_kernel": ["algorithm=deep_kernel"],
    "meta_sgd": ["algorithm=meta_sgd"],
    "reptile": ["algorithm=reptile"],
}

#: The four partitions: the same training, other queries. A fifth of the items and of the ratings are held out.
HELD_OUT = ["task.held_out_items=0.2", "task.held_out_ratings=0.2"]
PARTITIONS = [(users, items) for users in ("existing", "new") for items in ("existing", "new")]
PARTITIONED = ("ridge_rbf", "anil")

METRICS = {
    "query_mae": "MAE",
    "query_mae_rounded": "MAE, rounded",
    "query_rmse": "RMSE",
    "query_ndcg": "nDCG@5",
}


def train(folder: Path, seeds: int, only: Sequence[str]) -> None:
    for name, baselines in BASELINES.items():
        if not only or "baselines" in only:
            sweep(folder / name, seeds, [*BASELINES_ALONE, baselines])
    for name, overrides in METHODS.items():
        if not only or name in only:
            sweep(folder / name, seeds, [*overrides, NO_BASELINES], OTHER_RATES.get(name, RATES))
    if only and "partitions" not in only:
        return
    for users, items in PARTITIONS:
        partition = [*HELD_OUT, f"task.users={users}", f"task.items={items}"]
        place = folder / "partitions" / f"{users}_{items}"
        sweep(place / "baselines", seeds, [*BASELINES_ALONE, *partition, MEANS_AND_REGRESSIONS])
        for name in PARTITIONED:
            sweep(place / name, seeds, [*METHODS[name], *partition, NO_BASELINES], RATES)


def sweep(folder: Path, seeds: int, overrides: Sequence[str], rates: Sequence[str] = ()) -> None:
    command = [sys.executable, "-m", "mlframework.cli.train", "-m", "resume=true", *COMMON, *overrides]
    # Seeds first: with more of them the jobs before keep their numbers.
    command += [f"seed={','.join(map(str, range(seeds)))}"]
    command += [f"optimizer.lr={','.join(rates)}"] if rates else []
    command += [f"hydra.sweep.dir={folder}"]
    subprocess.run(command, check=False)


def record(folder: Path) -> dict[str, Any]:
    """The finished runs of one sweep: the command, the commit, and the means of every method by seed.

    Of a seed's runs the one counts whose validation tasks have the smallest error.
    """
    finished = defaultdict(list)
    for path in (folder / row.job / "result.json" for row in read_rows(folder) if row.status == "finished"):
        result = json.loads(path.read_text(encoding="utf-8"))
        finished[int(typed(result, "seed"))].append((result, path))
        left_out = ("seed=", "optimizer.lr=")
        command = ["mlframework-train", *(o for o in result["overrides"] if not o.startswith(left_out))]
    runs = [run(seed, found) for seed, found in sorted(finished.items())]
    return {"command": " ".join(command), "runs": runs} if runs else {}


def run(seed: int, finished: Sequence[tuple[dict[str, Any], Path]]) -> dict[str, Any]:
    """What is kept of one seed: the best run on validation tasks, and what the others reached there."""
    tried = {typed(result, "optimizer.lr"): result["evaluation"]["rows"][0]["validation"] for result, _ in finished}
    result, path = min(finished, key=lambda found: float(found[0]["evaluation"]["rows"][0]["validation"]))
    environment = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))
    rows, users = result["evaluation"]["rows"], [task[0] for task in result["evaluation"]["sources"]]
    return {
        "seed": seed,
        "rate": typed(result, "optimizer.lr"),
        "validation_mae_by_rate": tried,
        "commit": environment["git"]["commit"],
        "machine": environment["machine"],
        "seconds": result["seconds"],
        "task_hash": result["evaluation"]["task_hash"],
        "rows": [
            {
                "method": row["method"],
                "setting": row["setting"],
                "steps": row["chosen"],
                "of_user": {metric: by_user(row["values"][metric], users) for metric in METRICS},
            }
            for row in rows
        ],
    }


def typed(result: Mapping[str, Any], key: str) -> str:
    """The value of an override; empty if it was not typed."""
    return next((o.split("=", 1)[1] for o in result["overrides"] if o.startswith(f"{key}=")), "")


def by_user(values: Sequence[float], users: Sequence[str]) -> dict[str, float]:
    """The mean over each user's draws."""
    of_user: dict[str, list[float]] = {}
    for value, user in zip(values, users, strict=True):
        of_user.setdefault(user, []).append(value)
    return {user: round(sum(found) / len(found), 5) for user, found in sorted(of_user.items())}


def collect(folder: Path) -> None:
    """Writes one record for each sweep."""
    for name in (*BASELINES, *METHODS):
        if found := record(folder / name):
            write_json(RECORDS / f"{name}.json", found)
    for users, items in PARTITIONS:
        for name in ("baselines", *PARTITIONED):
            if found := record(folder / "partitions" / f"{users}_{items}" / name):
                write_json(RECORDS / "partitions" / f"{users}_{items}_{name}.json", found)


#: The methods from which differences are taken, and their short names.
MEANS, KERNEL_RIDGE = "item and user means, attribute offsets", "kernel_ridge on each user"
REFERENCES = {MEANS: "means", KERNEL_RIDGE: "kernel ridge"}
DIFFERENCES = [
    *(("query_mae", other) for other in REFERENCES),
    *((metric, KERNEL_RIDGE) for metric in ("query_mae_rounded", "query_rmse", "query_ndcg")),
]

Values = dict[str, dict[int, dict[str, Any]]]


def values(records: Mapping[str, Any]) -> Values:
    """The row of each method by seed; the algorithm of a record has the record's name, baselines their own."""
    found: Values = {}
    for name, each in records.items():
        for run in each["runs"]:
            of_algorithm, *of_baselines = run["rows"]
            if name not in BASELINES:
                found.setdefault(name, {})[run["seed"]] = of_algorithm
            for row in of_baselines:
                found.setdefault(row["method"], {})[run["seed"]] = row
    return found


def read(pattern: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob(pattern))}


def interval(numbers: Sequence[float]) -> str:
    """The mean over seeds, with its 95 % interval."""
    found = Interval.of(torch.tensor(numbers, dtype=torch.float64))
    return shown_interval(found.mean, found.half_width)


def table(rows: Values) -> str:
    """A markdown table, the smallest MAE first; differences are paired by seed and user."""
    header = ["method", "seeds", *METRICS.values()]
    header += [f"{METRICS[metric]} minus {REFERENCES[other]}" for metric, other in DIFFERENCES]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, runs in sorted(rows.items(), key=lambda item: average(item[1])):
        cells = [interval([mean_of(run, metric) for run in runs.values()]) for metric in METRICS]
        minus = ["" if name == other else paired(runs, rows[other], metric) for metric, other in DIFFERENCES]
        lines.append("| " + " | ".join([name, str(len(runs)), *cells, *minus]) + " |")
    return "\n".join(lines)


def average(runs: Mapping[int, Any]) -> float:
    return sum(mean_of(run, "query_mae") for run in runs.values()) / len(runs)


def mean_of(row: Mapping[str, Any], metric: str) -> float:
    """The mean over the test users of a seed."""
    values = row["of_user"][metric].values()
    return float(sum(values) / len(values))


def paired(ours: Mapping[int, Any], theirs: Mapping[int, Any], metric: str) -> str:
    """The mean difference of each test user of each seed, with the wider of two intervals.

    Users of a seed share a split and a training, and one user may test under several seeds: one interval has users and
    seeds as sources. The other is Student's over the means of seeds, which knows how few seeds are.
    """
    differences, users, means = [], [], []
    for seed in sorted(ours.keys() & theirs.keys()):
        other = theirs[seed]["of_user"][metric]
        own = [value - other[user] for user, value in ours[seed]["of_user"][metric].items()]
        differences += own
        users += [(user, f"seed {seed}") for user in ours[seed]["of_user"][metric]]
        means.append(sum(own) / len(own))
    found = Interval.of(torch.tensor(differences, dtype=torch.float64), users)
    over_seeds = Interval.of(torch.tensor(means, dtype=torch.float64)).half_width
    return shown_interval(found.mean, max(over_seeds, found.over_sources or 0.0))


def partition_tables() -> Iterator[str]:
    """A row for each method, a column for each partition; then differences from kernel ridge regression."""
    columns = {}
    for users, items in PARTITIONS:
        prefix = f"{users}_{items}_"
        records = {name.removeprefix(prefix): each for name, each in read(f"partitions/{prefix}*.json").items()}
        columns[f"{users} users, {items} items"] = values(records)
    for metric, title in METRICS.items():
        methods = dict.fromkeys(name for column in columns.values() for name in column)
        yield f"\n{title}:\n\n| method | " + " | ".join(columns) + " |\n|" + " --- |" * (1 + len(columns))
        for method in methods:
            cells = [
                interval([mean_of(run, metric) for run in column[method].values()]) if method in column else ""
                for column in columns.values()
            ]
            yield f"| {method} | " + " | ".join(cells) + " |"
    yield "\nMAE minus kernel ridge on each user:\n\n| method | " + " | ".join(columns) + " |\n|" + " --- |" * 5
    for method in methods:
        if method != KERNEL_RIDGE:
            cells = [paired(found[method], found[KERNEL_RIDGE], "query_mae") for found in columns.values()]
            yield f"| {method} | " + " | ".join(cells) + " |"


def provenance(records: Mapping[str, Any]) -> str:
    """The commits, the seeds and the time of the runs."""
    runs = [run for each in records.values() for run in each["runs"]]
    commits = sorted({run["commit"][:7] for run in runs})
    machines = sorted({run["machine"] for run in runs})
    seconds = sorted(run["seconds"] for name, each in records.items() if name not in BASELINES for run in each["runs"])
    return (
        f"{len(runs)} runs, commits {', '.join(commits)}, {', '.join(machines)}; a training takes {seconds[0]:.0f} to "
        f"{seconds[-1]:.0f} s, {seconds[len(seconds) // 2]:.0f} s in the median, on one core."
    )


def tables() -> None:
    page, records = ROOT / "docs" / "ratings.md", read("*.json")
    write_part(page, "scripts/ratings.py methods", f"{table(values(records))}\n\n{provenance(records)}")
    write_part(page, "scripts/ratings.py partitions", "\n".join(partition_tables()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "tables"])
    parser.add_argument("folder", type=Path, help="where the runs are")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", default="", help="methods, separated by commas; partitions: the four partitions")
    asked = parser.parse_args()
    if asked.stage == "train":
        train(asked.folder, asked.seeds, [name for name in asked.only.split(",") if name])
        return
    collect(asked.folder)
    tables()


if __name__ == "__main__":
    main()
