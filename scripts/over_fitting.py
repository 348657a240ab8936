"""Writes the tables and figures of docs/over-fitting.md: nothing there is typed by hand.

`python scripts/over_fitting.py runs/few_tasks runs/shots runs/memorise` collects the finished runs of the page's sweeps
in results/over_fitting/, and draws the page from it; without folders it draws from what was collected.
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
from seeds import read_runs

from mlframework.evaluation.interval import Interval
from mlframework.files import as_json, atomic, write_part

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "over_fitting"
SWEEPS = ("few_tasks", "shots", "memorise")
PAGE, PLOT = ROOT / "docs" / "over-fitting.md", ROOT / "docs" / "over_fitting.png"
#: The metric of each experiment, by which things are told apart.
METRICS = {
    "few_tasks_sinusoid": "query_loss",
    "few_tasks_omniglot_maml": "query_accuracy",
    "few_tasks_omniglot_prototypes": "query_accuracy",
    "memorise_omniglot": "query_accuracy",
    "memorise_pose": "query_degrees",
}
#: Decimals of a metric in a table.
DIGITS = {"query_loss": 2, "query_accuracy": 3, "query_degrees": 1}
#: Overrides by which an ablation's reference, whose training tasks are mutually exclusive, is known.
EXCLUSIVE = {"memorise_omniglot": "task=omniglot", "memorise_pose": "task.exclusive=true"}
#: How the table calls an override.
NAMES = {"base_layer=perturbed_conv4": "perturbed layers"}
#: Overrides that change nothing, and are typed in a sweep all the same.
DEFAULTS = ("task.exclusive=False", "regulariser=[]")
TRAIN, TEST = "#1558a8", "#c2570c"

Record = dict[str, Any]


def collect(folder: Path) -> list[Record]:
    """A record of each finished run below a folder: its settings, and its measure of over-fitting."""
    return [record(run, result) for run, result in read_runs(folder)]


def record(run: Path, result: Mapping[str, Any]) -> Record:
    evaluation = result["evaluation"]
    typed = [each for each in result["overrides"] if not each.startswith(("run_dir", "threads", "hydra"))]
    settings = dict(each.replace("=True", "=true").split("=", 1) for each in typed if each not in DEFAULTS)
    row = evaluation["rows"][0]
    return {
        "experiment": settings.pop("experiment"),
        "seed": int(settings.pop("seed", 0)),
        "settings": [f"{key}={value}" for key, value in settings.items()],
        "chosen": row["chosen"],
        "test": {name: intervals[row["steps"].index(row["chosen"])] for name, intervals in row["metrics"].items()},
        "measured": evaluation["measures"]["over_fitting"],
        "task_hash": evaluation["task_hash"],
        "outer_steps": result["step"],
        "seconds": result["seconds"],
        "commit": result["git"]["commit"],
    }


def grouped(records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Records that differ in their seed alone, by experiment and settings."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for each in records:
        groups[(each["experiment"], *each["settings"])].append(each)
    return groups


def measured(each: Record, metric: str, split: str, part: str = "query") -> float:
    """A score of a part of the episodes of a split after the chosen steps, in one run."""
    return each["measured"][metric.replace("query", part)][f"{split}, {each['chosen']} steps"]["mean"]


def interval(values: Sequence[float], digits: int) -> str:
    """A mean over seeds with half its 95 % interval."""
    found = Interval.of(torch.tensor(values, dtype=torch.float64))
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}" if len(values) > 1 else f"{found.mean:.{digits}f}"


def kinds_of(records: Sequence[Record], metric: str) -> list[str]:
    """Cells: training and test tasks, their difference; support, and its difference, of test tasks."""
    digits = DIGITS[metric]
    train, test, support = (
        [measured(each, metric, split, part) for each in records]
        for split, part in (("train", "query"), ("test", "query"), ("test", "support"))
    )
    to_tasks = [b - a for a, b in zip(train, test, strict=True)]
    to_support = [b - a for a, b in zip(support, test, strict=True)]
    return [interval(values, digits) for values in (train, test, to_tasks, support, to_support)]


def number_of(settings: Sequence[str], key: str) -> int:
    return next(int(each.split("=")[1]) for each in settings if each.startswith(f"{key}="))


def curve_table(records: Sequence[Record], key: str, heading: str) -> Iterator[str]:
    """Lines of markdown: a row for each experiment and value of a key."""
    columns = ("train tasks", "test tasks", "test - train", "support of test tasks", "query - support")
    yield f"| | {heading} | " + " | ".join(columns) + " | inner steps | seeds |"
    yield "|" + " --- |" * (len(columns) + 4)
    for (experiment, *settings), group in sorted(grouped(records).items(), key=lambda g: (g[0][0], number(g[0], key))):
        metric = METRICS[experiment]
        steps = ", ".join(map(str, sorted({each["chosen"] for each in group})))
        cells = [named(experiment), str(number_of(settings, key)), *kinds_of(group, metric), steps, str(len(group))]
        yield "| " + " | ".join(cells) + " |"


def number(group: Sequence[str], key: str) -> int:
    return number_of(group[1:], key)


def named(experiment: str) -> str:
    metric = METRICS[experiment].removeprefix("query_")
    return f"{experiment.partition('_tasks_')[2].replace('_', ', ')} ({metric})"


def gaps(records: Sequence[Record]) -> Iterator[str]:
    """Lines of markdown: a row for each regulariser, with the share of the gap to exclusive tasks that it closes."""
    groups = grouped(records)
    for experiment in sorted({each["experiment"] for each in records}):
        metric = METRICS[experiment]
        rows = {label(key): group for key, group in groups.items() if key[0] == experiment}
        found = {key: tested(group, metric) for key, group in rows.items()}
        gap = minus(found["exclusive", "none"], found["fixed", "none"])
        columns = (
            "train tasks",
            "test tasks",
            "minus none",
            "minus none, exclusive tasks",
            "share of the gap",
            "seeds",
        )
        yield f"| {experiment}, {metric.removeprefix('query_')} | " + " | ".join(columns) + " |"
        yield "|" + " --- |" * (len(columns) + 1)
        shown = [key for key in rows if key[0] == "fixed" or key[1] == "none"]
        for data, regulariser in sorted(shown, key=lambda key: (key[0], key[1] != "none", key[1])):
            group, digits = rows[data, regulariser], DIGITS[metric]
            train = interval([measured(each, metric, "train") for each in group], digits)
            cells = [train, interval(list(found[data, regulariser].values()), digits), "", "", ""]
            if regulariser != "none":
                more = minus(found["fixed", regulariser], found["fixed", "none"])
                anyway = minus(found.get(("exclusive", regulariser), {}), found["exclusive", "none"])
                cells[2:4] = [interval(list(each.values()), digits) if each else "" for each in (more, anyway)]
                won = minus(more, anyway)
                same = [seed for seed in won if seed in gap]
                cells[4] = f"{sum(won[s] for s in same) / sum(gap[s] for s in same):.0%}" if same else ""
            yield f"| {data} tasks, {regulariser} | " + " | ".join(map(str, (*cells, len(group)))) + " |"
        yield ""


def minus(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Differences by seed, of the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def tested(group: Sequence[Record], metric: str) -> dict[int, float]:
    """The mean of a metric over the test tasks of the evaluation, after the chosen steps, by seed."""
    return {each["seed"]: each["test"][metric]["mean"] for each in group}


def label(key: Sequence[str]) -> tuple[str, str]:
    """The data of an ablation's run, and its regularisers with their settings."""
    experiment, *settings = key
    data = "exclusive" if EXCLUSIVE[experiment] in settings else "fixed"
    left_out = (EXCLUSIVE[experiment], "algorithm.adapts=")
    named = [NAMES.get(each, each) for each in settings if not each.startswith(left_out)]
    chosen = [each.removeprefix("regulariser=").strip("[]") for each in named]
    return data, ", ".join(chosen) or "none"


def draw(curves: Sequence[Record], shots: Sequence[Record]) -> None:
    """The two kinds side by side: over the number of training tasks, and over inner steps and shots."""
    experiments = sorted({each["experiment"] for each in curves})
    figure, axes = plt.subplots(2, len(experiments), figsize=(4.4 * len(experiments), 6.4), layout="constrained")
    for top, experiment in zip(axes[0], experiments, strict=True):
        over_tasks(top, [each for each in curves if each["experiment"] == experiment], METRICS[experiment])
        top.set_title(named(experiment), fontsize=10)
    over_steps(axes[1, 0], [each for each in curves if each["experiment"] == "few_tasks_sinusoid"])
    over_shots(axes[1, 1], shots)
    for rest in axes[1, 2:]:
        rest.set_axis_off()
    figure.savefig(PLOT, dpi=110)


def over_tasks(axes: Any, records: Sequence[Record], metric: str) -> None:
    """Over-fitting to training tasks: the query score of training and test tasks against the number of the former."""
    groups = {number(key, "train_tasks"): group for key, group in grouped(records).items()}
    for split, colour in (("train", TRAIN), ("test", TEST)):
        line(
            axes,
            {n: [measured(each, metric, split) for each in g] for n, g in groups.items()},
            colour,
            f"{split} tasks",
        )
    axes.set(xscale="log", xlabel="training tasks", ylabel=metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def over_steps(axes: Any, records: Sequence[Record]) -> None:
    """Over-fitting to the support set, by inner step, for the fewest and the most training tasks."""
    groups = {number(key, "train_tasks"): group for key, group in grouped(records).items()}
    for count, dashes in ((min(groups), "--"), (max(groups), "-")):
        steps = range(sum(row.startswith("test") for row in groups[count][0]["measured"]["query_loss"]))
        for part, colour in (("support", TRAIN), ("query", TEST)):
            cells = {
                n: [each["measured"][f"{part}_loss"][f"test, {n} steps"]["mean"] for each in groups[count]]
                for n in steps
            }
            line(axes, cells, colour, f"{part}, {count} training tasks", dashes)
    axes.set(xlabel="inner steps", ylabel="loss of test tasks", title="sinusoids: support and query", yscale="log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend above the curves
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def over_shots(axes: Any, records: Sequence[Record]) -> None:
    """Over-fitting to the support set, by shots."""
    groups = {number(key, "task.k_shot"): group for key, group in grouped(records).items()}
    for part, colour in (("support", TRAIN), ("query", TEST)):
        line(
            axes,
            {n: [measured(each, "query_loss", "test", part) for each in g] for n, g in groups.items()},
            colour,
            part,
        )
    axes.set(
        xscale="log", yscale="log", xlabel="shots", ylabel="loss of test tasks", title="sinusoids: support and query"
    )
    axes.set_xticks(sorted(groups), [str(count) for count in sorted(groups)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def line(axes: Any, cells: Mapping[int, Sequence[float]], colour: str, name: str, dashes: str = "-") -> None:
    """Means over seeds, and each seed as a point."""
    places = sorted(cells)
    axes.plot(places, [sum(cells[n]) / len(cells[n]) for n in places], dashes, color=colour, label=name)
    for n in places:
        axes.plot([n] * len(cells[n]), cells[n], ".", color=colour, alpha=0.5)


def stored() -> list[list[Record]]:
    """The records of each sweep."""
    return [json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in SWEEPS]


def parts(curves: Sequence[Record], shots: Sequence[Record], memorise: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """The names of the page's parts, and their text."""
    yield "tasks", "\n".join(curve_table(curves, "train_tasks", "training tasks"))
    yield "shots", "\n".join(curve_table(shots, "task.k_shot", "shots"))
    yield "regularisers", "\n".join(gaps(memorise)).rstrip()
    everything = [*curves, *shots, *memorise]
    commits = sorted({each["commit"][:7] for each in everything})
    seconds = sum(each["seconds"] for each in everything) / 3600
    yield "made by", f"{len(everything)} runs, {seconds:.1f} hours in all; commits {', '.join(commits)}."


def main() -> None:
    for name, folder in zip(SWEEPS, sys.argv[1:], strict=False):
        FOLDER.mkdir(parents=True, exist_ok=True)
        with atomic(FOLDER / f"{name}.json") as part:
            part.write_text(as_json(collect(Path(folder)), indent=None) + "\n", encoding="utf-8")
    sweeps = stored()
    for name, text in parts(*sweeps):
        write_part(PAGE, f"scripts/over_fitting.py {name}", text)
    draw(*sweeps[:2])


if __name__ == "__main__":
    main()
