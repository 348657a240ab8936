"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mlframework.evaluation.number_format import shown_interval

if TYPE_CHECKING:
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
    """Prints a table, wider than the terminal if its columns need that: lines then wrap, and no column is emptied."""
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    console = Console()
    least = Measurement.get(console, console.options.update(width=1000), table).minimum  # no table is wider
    Console(width=max(console.width, least)).print(table)


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
