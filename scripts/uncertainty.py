"""Writes the tables and the figure of docs/uncertainty.md from results/uncertainty: nothing there is typed by hand.

`python scripts/uncertainty.py runs/uncertainty` collects the finished runs in a folder, whose evaluations have
`evaluation/measure=[uncertainty]`, and the reliability of those of `FIGURE`; it judges kernel ridge regression of the
inputs too. Without a folder it draws what was collected.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from seeds import read_runs

from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, default_estimator, grid, raw_inputs
from mlframework.evaluation.calibration import LEVELS, Answers, binned, coverage, mse, nll, predicted_queries
from mlframework.evaluation.displays.drawing import BLUE, GREY, RED, tidy
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.predictors.predictor import with_variance
from mlframework.evaluation.predictors.temperature import Temperature
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet
from mlframework.evaluation.uncertainty import Uncertainty
from mlframework.files import write_json, write_part
from mlframework.meta_layers import DeepKernel, MetaLayer
from mlframework.meta_layers.svm.kernels import RBFKernel
from mlframework.runs.git_state import git_state
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "results" / "uncertainty", ROOT / "docs" / "uncertainty.md"
PLOT = PAGE.with_name("reliability.png")

#: The runs whose reliability is drawn, by the name of their folder without the seed, with the title of the panel.
FIGURE = {
    "omniglot_maml": "MAML, Omniglot",
    "omniglot_prototypes": "prototypes, Omniglot",
    "omniglot_deep_kernel": "deep kernel, Omniglot",
    "sinusoid_maml": "MAML, sinusoids",
    "sinusoid_cnp": "neural process with a variance, sinusoids",
    "sinusoid_deep_kernel": "deep kernel, sinusoids",
    "ratings_maml": "MAML, ratings",
    "ratings_cnp": "neural process with a variance, ratings",
    "ratings_ridge_rbf": "ridge with an RBF kernel, ratings",
    "ratings_deep_kernel": "deep kernel, ratings",
}
BINS = 15

Row = dict[str, Any]


def collect(folder: Path) -> None:
    """Writes a file for each finished run, and the curves of the runs that are drawn; those of others stay."""
    kept = FOLDER / "reliability.json"
    curves: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for path, result in read_runs(folder):
        if "uncertainty" not in (result["evaluation"] or {"measures": ()})["measures"]:
            continue
        record = recorded(result)
        write_json(FOLDER / f"{path.name}.json", record)  # table, method, seed: sinusoid_maml_0
        method, _, seed = path.name.rpartition("_")
        if method in FIGURE and seed == "0":
            curves[method] = curves_of(path, record["chosen"])
    write_json(kept, curves, indent=None)


def recorded(result: Mapping[str, Any]) -> Row:
    """The command of a run, its cost, and the table of its evaluation."""
    evaluation = result["evaluation"]
    first = evaluation["rows"][0]
    at = first["steps"].index(first["chosen"])
    return {
        "command": " ".join(["mlframework-train", *(o for o in result["overrides"] if not o.startswith("run_dir="))]),
        "algorithm": result["choices"]["algorithm"],
        "commit": result["git"]["commit"],
        "outer_steps": result["step"],
        "seconds": result["seconds"],
        "task_hash": evaluation["task_hash"],
        "chosen": first["chosen"],
        "metrics": {metric: intervals[at] for metric, intervals in first["metrics"].items()},
        "uncertainty": evaluation["measures"]["uncertainty"],
    }


def judged_layer(layer: MetaLayer, named: str) -> Row:
    """The record of a method that is not meta-trained, on the test tasks of sinusoids."""
    found = Uncertainty(tasks=600, predictor={"temperature": Temperature()}).measure(layer, "test", 0)
    return {
        "command": "scripts/uncertainty.py",
        "algorithm": named,
        "commit": git_state()["commit"],
        "outer_steps": 0,
        "seconds": 0.0,
        "task_hash": TaskSet(layer.task, "test", tasks=600, seed=0).hash(),
        "chosen": 0,
        "uncertainty": found.to_json(),
    }


def kernel_ridge() -> Row:
    """Kernel ridge regression of the inputs of sinusoids, tuned on validation tasks, as conventional learning."""
    task, estimators = Sinusoid(), grid(default_estimator("regression"))
    validation = TaskSet(task, "validation", tasks=100, seed=VALIDATION_SEED)
    fitted = [FittedEstimators(raw_inputs(), task, estimator=estimator) for _, estimator in estimators]
    best = min(fitted, key=lambda layer: float(mse(predicted_queries(layer, validation, 0)).mean()))
    return judged_layer(best, f"{best.estimator}")


#: Length, noise and variance of the Gaussian process of the inputs.
PROCESSES = ((1, 2, 3, 4, 5, 6), (1e-10, 1e-8, 1e-6, 1e-4), (16, 256, 1024, 4096, 16384))


def gaussian_process() -> Row:
    """A Gaussian process of the inputs with an RBF kernel; validation tasks choose its numbers by the likelihood."""
    task = Sinusoid()
    validation = TaskSet(task, "validation", tasks=100, seed=VALIDATION_SEED)

    def process(length: float, noise: float, variance: float) -> DeepKernel:
        kernel = RBFKernel(gamma=1 / (2 * length**2), learn=False)
        layer = DeepKernel(
            raw_inputs(), task, kernel=kernel, variance=float(variance), noise=1e-12, least_noise=noise, learn=()
        )
        return layer.eval()

    def cost(numbers: tuple[float, float, float]) -> float:
        return float(nll(predicted_queries(process(*numbers), validation, 0)).mean())

    best = min(itertools.product(*PROCESSES), key=cost)
    return judged_layer(process(*best), "length {}, noise {}, variance {}".format(*best))


def curves_of(run: Path, steps: int) -> Row:
    """The reliability of a run's answers on test tasks, before and after temperature scaling."""
    layer = load_run(RunFolder(run), weights="best", device="cpu").meta_layer
    validation = TaskSet(layer.task, "validation", tasks=100, seed=VALIDATION_SEED)
    tasks = TaskSet(layer.task, "test", tasks=600, seed=0)
    stated = with_variance(layer, validation, steps)
    change = Temperature().fitted(stated, validation, steps).of_distributions
    assert change is not None
    answers = predicted_queries(stated, tasks, steps)
    return {"before": curve(answers), "after": curve(answers.changed(change))}


def curve(answers: Answers) -> Row:
    """Points of confidence and accuracy, or of nominal probability and coverage."""
    if answers.kind == "regression":
        return {"kind": "regression", "x": LEVELS.tolist(), "y": coverage(answers).mean(0).tolist()}
    bins = binned(answers, BINS)
    there = bins.queries > 0
    found = {"x": bins.confidence, "y": bins.accuracy, "queries": bins.queries}
    return {"kind": "classification", **{name: each[there].tolist() for name, each in found.items()}}


def rows_of(table: str) -> dict[str, list[Row]]:
    """The records of each method of a table, one a seed."""
    found = defaultdict(list)
    for path in sorted(FOLDER.glob(f"{table}_*.json")):
        found[path.stem.rpartition("_")[0].removeprefix(f"{table}_")].append(json.loads(path.read_text()))
    return found


def columns_of(record: Row) -> dict[str, Row]:
    """The table of a record by the name of the predictor, without its setting; the first is `before`."""
    first, *others = record["uncertainty"].items()
    return {"before": first[1], **{heading.split(" (")[0]: rows for heading, rows in others}}


#: Columns of each table: heading, predictor, measure, digits.
COLUMNS = {
    "sinusoid": [
        ("MSE", "before", "mse", 4),
        ("NLL", "before", "nll", 2),
        ("NLL, temperature", "temperature", "nll", 2),
        ("NLL, Laplace", "laplace", "nll", 2),
        ("interval error", "before", "interval_error", 3),
        ("interval error, temperature", "temperature", "interval_error", 3),
        ("coverage of 90 %", "before", "coverage_90", 3),
        ("AUROC", "before", "auroc_other_task", 3),
    ],
    "ratings": [
        ("MSE", "before", "mse", 3),
        ("NLL", "before", "nll", 3),
        ("NLL, temperature", "temperature", "nll", 3),
        ("NLL, Laplace", "laplace", "nll", 3),
        ("interval error", "before", "interval_error", 3),
        ("interval error, temperature", "temperature", "interval_error", 3),
        ("coverage of 90 %", "before", "coverage_90", 3),
        ("AUROC", "before", "auroc_other_task", 3),
    ],
    "omniglot": [
        ("accuracy", "before", "accuracy", 3),
        ("NLL", "before", "nll", 3),
        ("NLL, temperature", "temperature", "nll", 3),
        ("ECE", "before", "ece", 3),
        ("ECE, temperature", "temperature", "ece", 3),
        ("ECE, Laplace", "laplace", "ece", 3),
        ("ECE, ensemble", "ensemble", "ece", 3),
        ("Brier", "before", "brier", 3),
        ("AUROC", "before", "auroc_other_task", 3),
    ],
}


def table(name: str) -> str:
    """A markdown table, the method with the lowest likelihood cost first."""
    methods = rows_of(name)
    records = [record for rows in methods.values() for record in rows]
    wanted = [column for column in COLUMNS[name] if any(has(record, column) for record in records)]
    lines = ["| " + " | ".join(["method", "seeds", *(heading for heading, *_ in wanted), "minutes", "command"]) + " |"]
    lines.append("|" + " --- |" * (len(wanted) + 4))
    order = sorted(methods.items(), key=lambda item: mean(columns_of(row)["before"]["nll"]["mean"] for row in item[1]))
    for method, records in order:
        minutes = f"{mean(record['seconds'] for record in records) / 60:.1f}"
        command = f"`{without_common(records[0]['command'])}`"
        cells = [method.replace("_", " "), str(len(records)), *(cell(records, column) for column in wanted)]
        lines.append("| " + " | ".join([*cells, minutes, command]) + " |")
    return "\n".join(lines)


def has(record: Row, column: tuple[str, str, str, int]) -> bool:
    _, predictor, measure, _ = column
    return measure in columns_of(record).get(predictor, {})


def cell(records: Sequence[Row], column: tuple[str, str, str, int]) -> str:
    """The mean over seeds with the wider of the intervals over seeds, and over tasks or sources."""
    _, predictor, measure, digits = column
    found = [columns_of(record)[predictor][measure] for record in records if has(record, column)]
    if not found:
        return ""
    widths = [each["half_width"] if each["over_sources"] is None else each["over_sources"] for each in found]
    width = mean(widths)
    if len(found) > 1:
        width = max(width, Interval.of(torch.tensor([each["mean"] for each in found])).half_width)
    return f"{mean(each['mean'] for each in found):.{digits}f} ± {width:.{digits}f}"


def without_common(command: str) -> str:
    """A command without what all rows of a table share, and without the seed."""
    common = (
        "seed=",
        "task.split_seed=",
        "threads=",
        "display=",
        "evaluation",
        "trainer.validat",
        "task=",
        "task/source=",
    )
    return " ".join(typed for typed in command.split() if not typed.startswith(common))


def about(records: Iterator[Row]) -> str:
    """Commits, outer steps and hashes of some records."""
    found = list(records)
    commits = ", ".join(sorted({record["commit"][:7] for record in found}))
    hashes = ", ".join(f"`{each}`" for each in sorted({record["task_hash"] for record in found}))
    return f"Commits {commits}; test tasks {hashes}."


def draw() -> None:
    """The reliability of each run of `FIGURE`, before and after temperature scaling."""
    curves = json.loads((FOLDER / "reliability.json").read_text())
    there = [name for name in FIGURE if name in curves]
    lines = -(-len(there) // 3)
    figure, panels = plt.subplots(lines, 3, figsize=(10.5, 3.6 * lines), layout="constrained", squeeze=False)
    for axes, name in zip(panels.flat, there, strict=False):
        axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2)
        for when, colour in (("before", RED), ("after", BLUE)):
            found = curves[name][when]
            label = {"before": "as trained", "after": "with temperature"}[when]
            axes.plot(found["x"], found["y"], "-o", color=colour, markersize=3.5, label=label)
        regression = curves[name]["before"]["kind"] == "regression"
        tidy(axes, *(("nominal probability", "coverage") if regression else ("confidence", "accuracy")))
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_title(FIGURE[name], fontsize=10)
    for axes in panels.flat[len(there) :]:
        axes.axis("off")
    panels.flat[0].legend(frameon=False)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
        write_json(FOLDER / "sinusoid_kernel_ridge_of_inputs_0.json", kernel_ridge())
        write_json(FOLDER / "sinusoid_gaussian_process_of_inputs_0.json", gaussian_process())
    for name in COLUMNS:
        if methods := rows_of(name):
            text = f"{table(name)}\n\n{about(record for rows in methods.values() for record in rows)}"
            write_part(PAGE, f"scripts/uncertainty.py {name}", text)
    draw()


if __name__ == "__main__":
    main()
