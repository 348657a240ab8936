"""The report of a comparison: a table for the terminal, a page of markdown, and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mlframework.evaluation.comparison import Comparison, Standing, widest
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.number_format import shown, shown_interval
from mlframework.runs.compare import Compared
from mlframework.runs.tables import titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["comparison_figure", "comparison_page", "comparison_table", "curve_lines"]

#: The colour of the algorithm, and those of other methods.
OURS, OTHERS = "black", "tab10"


def columns_of(found: Comparison) -> list[str]:
    return ["method", found.metric.replace("_", " "), f"minus {found.standings[0].row.method}", "p (Holm)", "verdict"]


COSTS = ["training, s", "tuning, CPU s", "per task, CPU ms"]


def cells(standing: Standing, metric: str, tasks: int) -> list[str]:
    """A line of the table."""
    row, cost = standing.row, standing.cost
    named = f"{row.method}, {row.setting}" if row.setting else row.method
    named += f" ({row.batch_norm})" if row.batch_norm != "none" else ""
    named += f" ({row.tasks} tasks)" if row.tasks != tasks else ""
    value = interval_text(row.interval(metric)) + (f" ({row.chosen})" if len(row.steps) > 1 else "")
    minus = "" if row.difference is None else interval_text(row.difference[metric])
    p = "" if standing.adjusted is None else p_text(standing.adjusted)
    training = "" if cost.training is None else f"{cost.training:.0f}"
    return [named, value, minus, p, standing.verdict, training, shown(cost.tuning, 2), shown(1000 * cost.adapting, 2)]


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(found: Interval) -> str:
    return shown_interval(found.mean, widest(found))


def comparison_table(found: Comparison) -> Table:
    """The comparison on the run's own tasks, for the terminal; settings are in the report."""
    drawn = f"{found.tasks} {found.split} tasks (seed {found.seed}, hash {found.task_hash})"
    table = titled(f"{found.metric.replace('_', ' ')} on {drawn}", caption(found))
    names = [*columns_of(found), *COSTS]
    for name in names:
        text = name in ("method", "verdict")
        table.add_column(name, justify="left" if text else "right", no_wrap=name in names[:4])
    for standing in found.standings:
        bare = standing._replace(row=standing.row._replace(setting=""))
        table.add_row(*cells(bare, found.metric, found.tasks))
    return table


def caption(found: Comparison) -> str:
    over = "tasks" if found.sources is None else "sources"
    better = "more" if found.higher_is_better else "less"
    return (
        f"mean ± half width of the 95 % interval over {over}, {better} is better; (steps) and settings are chosen on "
        f"{found.validation_tasks} validation tasks; differences are paired; p: Wilcoxon's signed-rank test, corrected "
        "by Holm; a method wins, loses or is level if interval and test agree"
    )


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def comparison_page(compared: Compared, about: Mapping[str, Any]) -> str:
    """The report in markdown; `about` has the command, the commit and the machine."""
    own = compared.own
    parts = [
        f"# {compared.algorithm} beside conventional learning",
        f"`{about['command']}`",
        f"{own.tasks} {own.split} tasks, seed {own.seed}, hash `{own.task_hash}`; commit {about['commit']}; "
        f"training seed {about['seed']}; {about['machine']}.",
        markdown([*columns_of(own), *COSTS], [cells(s, own.metric, own.tasks) for s in own.standings]),
        f"{caption(own)}. Training is seconds of the clock for one network, once. Tuning and adapting are time of the "
        "processor; adapting includes the prediction of a task's queries.",
        "## Where conventional learning wins",
        "\n".join(verdict_lines(compared)),
    ]
    if compared.curve:
        said = "Winners by shots, and where a method catches up: its mean is as good or better up to the last point."
        parts += ["## Learning curves", curve_table(compared), said, "\n".join(curve_lines(compared))]
    if compared.curve or compared.own.standings:
        parts.append("![Differences and learning curves](comparison.png)")
    for name, found in compared.across.items():
        drawn = f"{found.tasks} {found.split} tasks, seed {found.seed}, hash `{found.task_hash}`"
        lines = [cells(s, found.metric, found.tasks) for s in found.standings]
        parts += [f"## The same weights on {name}", drawn, markdown([*columns_of(found), *COSTS], lines)]
    return "\n\n".join(parts) + "\n"


def verdict_lines(compared: Compared) -> Iterator[str]:
    """One line for each verdict, with the methods that it is of."""
    first = compared.own.standings[0].row.method
    said = {
        "wins": f"better than {first}",
        "level": f"not told apart from {first}",
        "undecided": "interval and test disagree",
        "loses": f"worse than {first}",
    }
    for verdict, words in said.items():
        methods = [s.row.method for s in compared.own.standings if s.verdict == verdict]
        yield f"* {words}: {', '.join(methods) or 'none'}"


def curve_table(compared: Compared) -> str:
    """A row for each method, a column for each number of shots."""
    curve = compared.curve
    methods = dict.fromkeys((s.row.method, s.row.batch_norm) for found in curve.values() for s in found.standings)
    lines = []
    for method in methods:
        line = [method[0] + (f" ({method[1]})" if method[1] != "none" else "")]
        for found in curve.values():
            at = [s.row for s in found.standings if (s.row.method, s.row.batch_norm) == method]
            line.append(interval_text(at[0].interval(found.metric)) if at else "")
        lines.append(line)
    return markdown(["shots", *(f"{k} ({found.tasks} tasks)" for k, found in curve.items())], lines)


def curve_lines(compared: Compared) -> Iterator[str]:
    """Which methods win at each number of shots, and where each method catches up, in words."""
    first, last = min(compared.curve), max(compared.curve)
    for shots, comparison in compared.curve.items():
        winning = [each.row.method for each in comparison.standings if each.verdict == "wins"]
        yield f"* k_shot={shots}: better than {compared.algorithm}: {', '.join(winning) or 'none'}"
    alike: dict[str, list[str]] = {}
    for method, found in compared.crossings.items():
        alike.setdefault(found.described(first, last), []).append(method)
    for described, methods in alike.items():
        yield f"* {described}: {', '.join(methods)}"


def comparison_figure(compared: Compared) -> Figure:
    """Paired differences on the run's own tasks, and learning curves where there are any."""
    from matplotlib.figure import Figure

    panels = 2 if compared.curve else 1
    figure = Figure(figsize=(6.0 * panels, 4.2), layout="constrained")
    draw_differences(figure.add_subplot(1, panels, 1), compared)
    if compared.curve:
        draw_curves(figure.add_subplot(1, panels, 2), compared)
    return figure


def draw_differences(axes: Any, compared: Compared) -> None:
    """A point with its interval for each method, the algorithm at zero."""
    own = compared.own
    shown_rows = [s.row for s in own.standings if s.verdict]
    for place, row in enumerate(shown_rows):
        assert row.difference is not None
        found = row.difference[own.metric]
        axes.errorbar(found.mean, -place, xerr=widest(found), fmt="o", color="tab:blue", capsize=3)
    axes.axvline(0, color=OURS, linewidth=1)
    axes.set_yticks([-place for place in range(len(shown_rows))], [row.method for row in shown_rows])
    better = "right" if own.higher_is_better else "left"
    axes.set_xlabel(f"{own.metric.replace('_', ' ')} minus {compared.algorithm} (better: {better})")
    axes.grid(axis="x", alpha=0.3)


def draw_curves(axes: Any, compared: Compared) -> None:
    """Each method's metric by shots, with the band of its interval."""
    metric = compared.own.metric
    methods = dict.fromkeys(s.row.method for found in compared.curve.values() for s in found.standings)
    for number, method in enumerate(methods):
        points = []
        for shots, found in compared.curve.items():
            at = [s.row.interval(metric) for s in found.standings if s.row.method == method]
            points += [(shots, at[0].mean, widest(at[0]))] if at else []
        ours = method == compared.algorithm
        colour, width = (OURS, 2.5) if ours else (f"C{number % 10}", 1.2)
        x, mean, half = zip(*points, strict=True)
        axes.plot(x, mean, marker="o", markersize=3, color=colour, linewidth=width, label=method)
        if ours:
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axes.set_xscale("log")
    axes.set_xticks(list(compared.curve), [str(k) for k in compared.curve])
    axes.minorticks_off()
    if not compared.own.higher_is_better and all(line.get_ydata().min() > 0 for line in axes.lines):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(line.get_ydata().min() for line in axes.lines) / 2)
        low = [max(bound, axes.get_ylim()[0]) for bound in low]  # an interval may reach below zero
    axes.fill_between(list(compared.curve), low, high, color=OURS, alpha=0.15)
    axes.set_xlabel("shots")
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
