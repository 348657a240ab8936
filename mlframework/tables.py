"""Tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from mlframework.evaluation import Report, Row

__all__ = ["evaluation_table"]


def evaluation_table(report: Report, metric: str) -> Table:
    """One metric of every method, before, during and after adaptation, with 95 % intervals over tasks."""
    title = f"{metric.replace('_', ' ')} on {report.tasks} {report.split} tasks (seed {report.seed}, hash {report.task_hash})"
    table = Table(title=title, caption="mean ± half width of the 95 % interval over tasks", title_justify="left")
    for name in ("method", "batch norm", "tasks"):
        table.add_column(name)
    for name in ("before", "after 1 step", "after all steps"):
        table.add_column(name, justify="right")
    for row in report.rows:
        table.add_row(*cells(row, metric))
    return table


def cells(row: Row, metric: str) -> list[str]:
    """A row's texts; what was not judged at a step is left empty."""
    found = dict(zip(row.steps, row.metrics[metric], strict=True))
    last = row.steps[-1]
    after = f"{found[last]} ({last})" if len(found) > 1 else str(found[last])
    return [row.method, row.batch_norm, str(row.tasks), str(found.get(0, "")), str(found[1]) if 1 in found and last > 1 else "", after]
