"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mlframework.evaluation import Report, Row
    from mlframework.judging import Interval
    from mlframework.text.quality import Quality

__all__ = ["evaluation_table", "quality_table", "show_report"]


def show_report(report: Report, metric: str) -> None:
    """Prints the tables of an evaluation."""
    console = Console()
    console.print(evaluation_table(report, metric))
    if report.quality is not None:
        console.print(quality_table(report.quality))


def evaluation_table(report: Report, metric: str) -> Table:
    """One metric of every method, before and after adaptation, with 95 % intervals over tasks."""
    table = Table(
        title=f"{metric.replace('_', ' ')} on {report.split} tasks (seed {report.seed}, hash {report.task_hash})",
        caption="mean ± half width of the 95 % interval over tasks; (inner steps)",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method")
    mixing = any(row.batch_norm != "none" for row in report.rows)
    if mixing:
        table.add_column("batch norm")
    table.add_column("tasks", justify="right")
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        if metric not in row.metrics:
            continue
        policy = [row.batch_norm] if mixing else []
        table.add_row(row.method, *policy, str(row.tasks), *cells(row, metric))
    return table


def cells(row: Row, metric: str) -> tuple[str, str]:
    """Before adaptation, and after the last step; a method without a before leaves it empty."""
    before, after = row.metrics[metric][0], row.metrics[metric][-1]
    if len(row.steps) == 1:
        return "", short(after)
    return short(before), f"{short(after)} ({row.steps[-1]})"


def short(interval: Interval) -> str:
    return interval.shown(3)


def quality_table(quality: Quality) -> Table:
    """Every measure of generated texts, before and after adaptation, beside real text."""
    table = Table(
        title="generated texts of test sources",
        caption="mean ± half width of the 95 % interval over sources",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("measure")
    for name in ("before", "after", "real text"):
        table.add_column(name, justify="right", no_wrap=True)
    for measure, after in quality.after.items():
        before = "" if quality.before is None else short(quality.before[measure])
        table.add_row(measure.replace("_", " "), before, short(after), short(quality.real[measure]))
    return table
