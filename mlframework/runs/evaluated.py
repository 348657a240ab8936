"""A trained run on several combinations of task settings: one table of them, in the terminal and as csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from mlframework.evaluation.report import MethodResult, Report
from mlframework.files import atomic
from mlframework.runs.tables import print_table, short, titled

__all__ = ["Evaluated", "show_combinations"]


class Evaluated(NamedTuple):
    """One combination."""

    typed: Sequence[str]  # its overrides of the task
    report: Report
    path: Path  # the file of its report


def show_combinations(found: Sequence[Evaluated], metric: str) -> Path:
    """Prints the table and writes it as csv beside the reports; returns the file."""
    print_table(combinations_table(found, metric))
    first, last = (each.path.stem.partition("_")[0] for each in (found[0], found[-1]))
    path = found[0].path.with_name(f"table_{first}-{last}.csv")
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(csv_rows(found, metric))
    return path


def combinations_table(found: Sequence[Evaluated], metric: str) -> Table:
    """A row for each combination, with a column for each setting in which they differ and for each method."""
    settings, first = [by_key(each.typed) for each in found], found[0].report
    keys = dict.fromkeys(key for each in settings for key in each)
    varied = [key for key in keys if len(found) == 1 or len({each.get(key, "") for each in settings}) > 1]
    methods = dict.fromkeys(name_of(row) for each in found for row in each.report.rows)
    over = "tasks" if first.sources is None else "sources"
    drawn = f"{first.tasks} {first.split} tasks each, seed {first.seed}"
    table = titled(f"{metric.replace('_', ' ')} on {drawn}", f"mean ± half width of the 95 % interval over {over}")
    for key in varied:
        table.add_column(key, overflow="fold")
    table.add_column("hash", no_wrap=True)
    for name in methods:
        table.add_column(name, overflow="fold", justify="right")
    for each, own in zip(found, settings, strict=True):
        cells = {name_of(row): short(row.interval(metric)) for row in each.report.rows if metric in row.metrics}
        chosen = [own.get(key, "") for key in varied]
        table.add_row(*chosen, each.report.task_hash, *(cells.get(name, "") for name in methods))
    return table


def csv_rows(found: Sequence[Evaluated], metric: str) -> list[list[object]]:
    """The same with a line for each combination and method, and its header."""
    settings = [by_key(each.typed) for each in found]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    outcome = ["file", "hash", "tasks", "method", "batch_norm", "setting", "metric", "mean", "half_width"]
    lines: list[list[object]] = [[*keys, *outcome, "over_sources"]]
    for each, own in zip(found, settings, strict=True):
        for row in each.report.rows:
            if metric in row.metrics:
                found_at = row.interval(metric)
                about = [each.path.name, each.report.task_hash, row.tasks, row.method, row.batch_norm, row.setting]
                numbers = [found_at.mean, found_at.half_width, found_at.over_sources]
                lines.append([*(own.get(key, "") for key in keys), *about, metric, *numbers])
    return lines


def by_key(typed: Sequence[str]) -> dict[str, str]:
    """`["task.k_shot=5"]` as `{"k_shot": "5"}`."""
    pairs = (each.lstrip("+").partition("=") for each in typed)
    return {key.removeprefix("task.").removeprefix("task/"): value for key, _, value in pairs}


def name_of(row: MethodResult) -> str:
    return row.method if row.batch_norm == "none" else f"{row.method} ({row.batch_norm})"
