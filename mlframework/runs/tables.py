"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from mlframework.evaluation.number_format import shown_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlframework.evaluation.interval import Interval
    from mlframework.evaluation.report import Measured, Report

__all__ = ["evaluation_table", "measured_table", "print_table", "show_report", "titled"]


def show_report(report: Report, metric: str) -> None:
    """Prints the monitored metric, the query loss too if a method has that alone, and what was measured besides."""
    print_table(evaluation_table(report, metric))
    if not all(metric in row.metrics for row in report.rows):
        print_table(evaluation_table(report, "query_loss"))
    for measured in report.measures.values():
        print_table(measured_table(measured))


def print_table(table: Table) -> None:
    """Prints a table, wider than the terminal if its words need that: lines then wrap, and no word is broken.

    Brackets and colons in a cell, a heading or a title are text, for they come from the user: `task.sizes=[3]`.
    """
    console = Console(markup=False, emoji=False)
    ranges = [measured_column(console, column) for column in table.columns]
    frame = 3 * len(ranges) + 1  # two spaces and a line for each column
    least = frame + sum(each.minimum for each in ranges)
    wide = Console(markup=False, emoji=False, width=max(console.width, least))
    for column, width in zip(table.columns, shared_widths(ranges, wide.width - least), strict=True):
        column.width = width
    wide.print(table)


def measured_column(console: Console, column: Column) -> Measurement:
    """The width of a column's longest word, and of its longest cell."""
    options = console.options.update(width=1000)  # no cell is wider
    found = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    most = max(each.maximum for each in found)
    least = most if column.no_wrap else max(each.minimum for each in found)
    return Measurement(least, most).clamp(max_width=column.max_width)


def shared_widths(ranges: Sequence[Measurement], spare: int) -> list[int]:
    """The width of each column: its minimum plus an equal share of the spare width; no column exceeds its maximum."""
    widths = [each.minimum for each in ranges]
    needs = sorted(range(len(ranges)), key=lambda i: ranges[i].maximum - ranges[i].minimum)
    for place, i in enumerate(needs):
        more = min(ranges[i].maximum - ranges[i].minimum, spare // (len(needs) - place))
        widths[i], spare = widths[i] + more, spare - more
    return widths


def titled(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left")


def evaluation_table(report: Report, metric: str) -> Table:
    """One metric of every method, before and after adaptation, with 95 % intervals, and its distance from the first."""
    over = "tasks" if report.sources is None else "sources"
    drawn = f"{report.tasks} {report.split} tasks (seed {report.seed}, hash {report.task_hash})"
    table = titled(
        f"{metric.replace('_', ' ')} on {drawn}",
        f"mean ± half width of the 95 % interval over {over}; (steps) and settings are chosen on "
        f"{report.validation_tasks} validation tasks; differences are paired",
    )
    table.add_column("method", overflow="fold")
    mixing = any(row.batch_norm != "none" for row in report.rows)
    if mixing:
        table.add_column("batch norm")
    for name in ("before", "after (steps)", f"minus {report.rows[0].method}"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        if metric not in row.metrics:
            continue
        method = f"{row.method}, {row.setting}" if row.setting else row.method
        if row.tasks != report.tasks:
            method = f"{method} ({row.tasks} tasks)"
        before, after = "", short(row.interval(metric))
        if len(row.steps) > 1:
            before, after = short(row.metrics[metric][0]), f"{after} ({row.chosen})"
        minus = "" if row.difference is None else short(row.difference[metric])
        table.add_row(method, *([row.batch_norm] if mixing else []), before, after, minus)
    return table


def short(interval: Interval) -> str:
    """With the interval over sources where there is one: that over tasks would be too narrow."""
    widest = interval.half_width if interval.over_sources is None else interval.over_sources
    return shown_interval(interval.mean, widest)


def measured_table(measured: Measured) -> Table:
    table = titled(measured.title, "mean ± half width of the 95 % interval over sources")
    table.add_column("measure")
    for heading in measured.columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in next(iter(measured.columns.values())):
        table.add_row(name.replace("_", " "), *(short(column[name]) for column in measured.columns.values()))
    return table
