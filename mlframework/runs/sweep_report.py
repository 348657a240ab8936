"""What a sweep came to: its table in the terminal, as csv and as markdown, and its plot."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlframework.files import atomic, write_text
from mlframework.runs.sweep_figure import sweep_figure
from mlframework.runs.sweep_table import JobRow, grouped, over_what, read_rows, sweep_cells, sweep_table, varied_keys
from mlframework.runs.tables import print_table

__all__ = ["report_sweep", "write_sweep"]


def report_sweep(folder: Path) -> list[JobRow]:
    """Prints the table of a folder's jobs and writes it there; nothing where there are none. Returns their rows.

    Raises:
        OSError: it cannot be written; it has been printed before.
    """
    rows = read_rows(folder)
    if rows:
        show_sweep(folder, rows)
        write_sweep(folder, rows)
        print(f"written to {folder}: sweep.md, sweep.png, sweep.csv")
        print(f"next: tensorboard --logdir {folder}")
    return rows


def write_sweep(folder: Path, rows: Sequence[JobRow]) -> None:
    """Writes the table of a folder's jobs: `sweep.csv`, `sweep.md` and `sweep.png`; `sweep_jobs.csv` too, if joined."""
    groups, jobs = grouped(rows), folder / "sweep_jobs.csv"
    write_csv(folder / "sweep.csv", groups)
    if groups != rows:
        write_csv(jobs, rows)
    else:
        jobs.unlink(missing_ok=True)  # of an earlier sweep over seeds
    with atomic(folder / "sweep.png") as part:
        sweep_figure(groups).savefig(part, format="png", dpi=110)
    write_text(folder / "sweep.md", sweep_page(folder, rows))


def write_csv(path: Path, rows: Sequence[JobRow]) -> None:
    """Writes a column for every overridden key, between the job and its result."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "status", *keys, *JobRow._fields[3:]])
        for job, status, overrides, *outcome in rows:
            writer.writerow([job, status, *(overrides.get(key, "") for key in keys), *outcome])


def show_sweep(folder: Path, rows: Sequence[JobRow]) -> None:
    """Prints the table, and a line for each job that failed."""
    print_table(sweep_table(folder, grouped(rows)))
    for line in failures(rows):
        print(line)


def failures(rows: Sequence[JobRow]) -> Iterator[str]:
    """A line for each job with an error, and one for those that have not started."""
    yield from (f"job {row.job}: {row.error}" for row in rows if row.error)
    if waiting := sum(row.status == "not started" for row in rows):
        yield f"{waiting} not started: the same command starts them"


def sweep_page(folder: Path, rows: Sequence[JobRow]) -> str:
    """The table in markdown, with the errors and the settings that all jobs share."""
    groups = grouped(rows)
    headings, lines = sweep_cells(groups)
    text = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    text += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines]
    _, shared = varied_keys(groups)
    said = " ".join(f"{key}={value}" if value else key for key, value in shared.items())
    parts = [f"# {folder.name}", f"All jobs: `{said}`." if said else "", "\n".join(text), f"{over_what(groups)}."]
    parts += ["\n".join(f"* {line}" for line in failures(rows)), "![The means with their intervals](sweep.png)"]
    return "\n\n".join(part for part in parts if part) + "\n"
