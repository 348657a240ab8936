"""The plot of a sweep: each metric against a number that was swept, or job by job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlframework.runs.sweep_table import JobRow, rounded, varied_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sweep_figure"]

#: A plot names no more rows than this, nor draws more lines; the table has all.
MOST_ROWS, MOST_LINES = 40, 10

#: From this ratio of the largest to the smallest value on, an axis is logarithmic.
WIDE = 20


def sweep_figure(rows: Sequence[JobRow]) -> Figure:
    """A panel for each metric: test means with their intervals, where there are none those of validation."""
    from matplotlib.figure import Figure

    keys = [key for key in varied_keys(rows)[0] if key != "seed"]
    metrics = list(dict.fromkeys(row.metric for row in rows if mean_of(row) is not None))
    key = swept_number(rows, keys)
    height = 4.2 if key else 1.5 + 0.28 * min(len(rows), MOST_ROWS)
    figure = Figure(figsize=(7.0 * max(len(metrics), 1), height), layout="constrained")
    for number, metric in enumerate(metrics or [""]):
        axes = figure.add_subplot(1, max(len(metrics), 1), number + 1)
        shown = [row for row in rows if row.metric == metric and mean_of(row) is not None]
        if not shown:
            axes.text(0.5, 0.5, "no job has finished", ha="center", va="center")
            axes.set_axis_off()
        elif key:
            draw_lines(axes, shown, key, [other for other in keys if other != key])
        else:
            draw_rows(axes, shown[:MOST_ROWS], keys)
    return figure


def swept_number(rows: Sequence[JobRow], keys: Sequence[str]) -> str | None:
    """The one swept key with numbers, at least three of them, if the other keys leave few enough lines."""
    values = {key: {row.overrides.get(key, "") for row in rows} for key in keys}
    numbers = [key for key, found in values.items() if len(found) > 2 and all(number(value) for value in found)]
    if len(numbers) != 1:
        return None
    lines = {label(row, [key for key in keys if key != numbers[0]]) for row in rows}
    return numbers[0] if len(lines) <= MOST_LINES else None


def number(value: str) -> bool:
    try:
        return float(value) == float(value)
    except ValueError:
        return False


def mean_of(row: JobRow) -> float | None:
    return row.validation if row.test is None else row.test


def half_width_of(row: JobRow) -> float:
    return (row.validation_half_width if row.test is None else row.test_half_width) or 0.0


def label(row: JobRow, keys: Sequence[str]) -> str:
    """What makes a row differ, as in `maml k_shot=5`: the options of groups without their key."""
    parts = [(key, rounded(row.overrides[key])) for key in keys if row.overrides.get(key)]
    return " ".join(value if "." not in key else f"{key.rpartition('.')[2]}={value}" for key, value in parts)


def split_of(rows: Sequence[JobRow]) -> str:
    return "test" if all(row.test is not None for row in rows) else "validation"


def draw_lines(axes: Any, rows: Sequence[JobRow], key: str, others: Sequence[str]) -> None:
    """A line for each combination of the other keys."""
    lines: dict[str, list[JobRow]] = {}
    for row in rows:
        lines.setdefault(label(row, others), []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: float(row.overrides[key]))
        places, means = [float(row.overrides[key]) for row in line], [mean_of(row) for row in line]
        axes.errorbar(places, means, [half_width_of(row) for row in line], marker="o", ms=4, capsize=3, label=name)
    places = [float(row.overrides[key]) for row in rows]
    if min(places) > 0 and max(places) / min(places) >= WIDE:
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel(f"{split_of(rows)} {rows[0].metric.replace('_', ' ')}")
    scale(axes.set_yscale, rows)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)


def draw_rows(axes: Any, rows: Sequence[JobRow], keys: Sequence[str]) -> None:
    """A point for each row, the validation mean as a ring beside the test mean."""
    for place, row in enumerate(rows):
        axes.errorbar(mean_of(row), -place, xerr=half_width_of(row), fmt="o", color="tab:blue", capsize=3)
        if row.test is not None:
            axes.plot(row.validation, -place, "o", mfc="none", color="tab:orange")
    axes.plot([], [], "o", color="tab:blue", label=split_of(rows))
    if any(row.test is not None for row in rows):
        axes.plot([], [], "o", mfc="none", color="tab:orange", label="validation")
        axes.legend(fontsize=8)
    axes.set_yticks([-place for place in range(len(rows))], [label(row, keys) or row.job for row in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(rows[0].metric.replace("_", " "))
    scale(axes.set_xscale, rows)
    axes.grid(axis="x", alpha=0.3)


def scale(set_scale: Any, rows: Sequence[JobRow]) -> None:
    """A logarithmic axis where one mean is far larger than another."""
    means = [mean for row in rows if (mean := mean_of(row)) is not None]
    if min(means) > 0 and max(means) / min(means) >= WIDE:
        set_scale("log")
