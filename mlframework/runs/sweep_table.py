"""The rows of a sweep, from the records of its jobs, and their table."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mlframework.errors import UserError
from mlframework.evaluation.number_format import shown, shown_interval
from mlframework.reading import read_json
from mlframework.runs.overrides import DIGITS, identity, job_name, key_of, of_run
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.tables import titled

__all__ = ["FINE", "PLAN", "JobRow", "grouped", "over_what", "read_rows", "sweep_cells", "sweep_table", "varied_keys"]

log = logging.getLogger(__name__)

#: The jobs of the last grid that was started in a folder, in their order.
PLAN = "plan.json"

#: Files that stand in the folder of a job.
MARKS = ("result.json", "failed.json", "config.yaml")

#: What a sweep may leave without having failed.
FINE = ("finished", "running")


class JobRow(NamedTuple):
    """A line of the table.

    Attributes:
        job: its folder within the sweep's.
        status: finished; failed, or diverged if it would end so again; running; interrupted if it left no record;
            not started; damaged if its record cannot be read.
        metric: the monitored one. Its mean over validation tasks and over test tasks, with the half width of its 95 %
            interval, is None where there is none or it is not finite.
        seconds: spent training.
    """

    job: str
    status: str
    overrides: dict[str, str]
    metric: str = ""
    validation: float | None = None
    validation_half_width: float | None = None
    test: float | None = None
    test_half_width: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def identity(self) -> str:
        return identity(f"{key}={value}" if value else key for key, value in self.overrides.items())


def read_rows(folder: Path) -> list[JobRow]:
    """A row for each job below a folder: those of a plan in its order, then all others."""
    jobs = {path.parent for mark in MARKS for path in folder.rglob(mark)}
    found = {job: read_row(job, folder) for job in sorted(jobs, key=lambda job: natural(str(job)))}
    rows = []
    for plan in sorted(folder.rglob(PLAN), key=lambda plan: natural(str(plan))):
        there = {row.identity: job for job, row in found.items() if plan.parent in job.parents}
        for overrides in read_plan(plan):
            job = there.pop(identity(overrides), None)
            rows.append(found.pop(job) if job else unstarted(plan.parent / job_name(overrides), overrides, folder))
    return [*rows, *found.values()]


def read_plan(path: Path) -> list[list[str]]:
    """The overrides of each job; none, and a warning, if the plan cannot be read."""
    try:
        return [[str(override) for override in overrides] for overrides in read_json(path, list)]
    except (UserError, TypeError) as error:
        log.warning("%s: jobs that have not started are left out", error if path.name in str(error) else path)
    return []


def unstarted(job: Path, overrides: Sequence[str], folder: Path) -> JobRow:
    """A job that has no record: the same command starts it."""
    status = "running" if RunFolder(job).in_use else "not started"
    return JobRow(str(job.relative_to(folder)), status, by_key(overrides))


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which 10 comes after 9."""
    return [(int(digits or 0), other) for digits, other in re.findall(r"(\d+)|(\D+)", text)]


def read_row(job: Path, folder: Path) -> JobRow:
    name, run = str(job.relative_to(folder)), RunFolder(job)
    started: dict[str, str] = {}
    file = run.failed if os.path.lexists(run.failed) else run.result
    with suppress(UserError):  # they cannot be read
        started = by_key(run.overrides())
    if run.in_use:
        return JobRow(name, "running", started)
    if not file.exists():
        return JobRow(name, "interrupted", started, error="ended without a word: the same command goes on with it")
    try:
        record = read_json(file)
        row = JobRow(name, record["status"], by_key(record["overrides"]))
        return row._replace(error=record["error"]) if "error" in record else with_result(row, record)
    except (UserError, ValueError, LookupError, TypeError, AttributeError):
        return JobRow(name, "damaged", started, error=f"damaged: {file}")


def with_result(row: JobRow, record: Mapping[str, Any]) -> JobRow:
    """A row with what a result says of the monitored metric."""
    metric = record["monitor"]
    found, test = record["validation"][metric], test_interval(record.get("evaluation"), metric)
    numbers = (found["mean"], found["half_width"], *test, record["seconds"])
    validation, half_width, tested, its_half_width, seconds = map(finite, numbers)
    return JobRow(row.job, row.status, row.overrides, metric, validation, half_width, tested, its_half_width, seconds)


def test_interval(evaluation: Mapping[str, Any] | None, metric: str) -> tuple[float | None, float | None]:
    """The mean of an algorithm's metric over test tasks, and half its interval: over sources where they are shared."""
    row = evaluation["rows"][0] if evaluation else {"metrics": {}}
    if metric not in row["metrics"]:
        return None, None
    found = row["metrics"][metric][row["steps"].index(row["chosen"])]
    return found["mean"], found["half_width"] if found.get("over_sources") is None else found["over_sources"]


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """`["a.b=1"]` as `{"a.b": "1"}`, without the settings of the process."""
    kept = (override for override in of_run(overrides) if key_of(override) != "run_dir")
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in kept)}


def grouped(rows: Sequence[JobRow]) -> list[JobRow]:
    """A row for all seeds of the same overrides, with the interval over seeds; a single seed keeps that over tasks."""
    groups: dict[tuple[Any, ...], list[JobRow]] = {}
    seen: Counter[str] = Counter()  # the same job of two sweeps has a row in each
    for row in rows:
        of_seed = tuple(sorted(pair for pair in row.overrides.items() if pair[0] != "seed"))
        same = of_seed if row.overrides else (("job", row.job),)  # a damaged record: no seed of anything
        groups.setdefault((seen[row.identity], *same), []).append(row)
        seen[row.identity] += 1
    return [over_seeds(group) for group in groups.values()]


def over_seeds(rows: Sequence[JobRow]) -> JobRow:
    if len(rows) == 1:
        return rows[0]
    finished = [row for row in rows if row.status == "finished"]
    row = rows[0]._replace(
        job=",".join(row.job for row in rows),
        status="finished" if len(finished) == len(rows) else f"{len(finished)} of {len(rows)} finished",
        overrides={**rows[0].overrides, "seed": ",".join(row.overrides.get("seed", "") for row in rows)},
        error="; ".join(row.error for row in rows if row.error),
    )
    if not finished:
        return row
    validation, validation_half_width = interval_over([row.validation for row in finished])
    tested = [row for row in finished if row.test is not None]
    test, test_half_width = interval_over([row.test for row in finished]) if tested else (None, None)
    return row._replace(
        metric=finished[0].metric,
        validation=validation,
        validation_half_width=validation_half_width,
        test=test,
        test_half_width=test_half_width,
        seconds=sum(row.seconds or 0.0 for row in finished),
    )


def interval_over(means: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean of seeds and half its interval; with one that is not finite there is none: the others would flatter."""
    import torch

    from mlframework.evaluation.interval import Interval

    found = Interval.of(torch.tensor([math.nan if mean is None else mean for mean in means], dtype=torch.float64))
    return finite(found.mean), finite(found.half_width)


def varied_keys(rows: Sequence[JobRow]) -> tuple[list[str], dict[str, str]]:
    """The keys in which rows differ, and the settings that all of them share."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    values = {key: {row.overrides.get(key, "") for row in rows if row.overrides} for key in keys}
    shared = {key: found.pop() for key, found in values.items() if len(found) == 1}
    return [key for key in keys if key not in shared], shared


def sweep_cells(rows: Sequence[JobRow]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells of a table: a column for every key in which rows differ."""
    varied, _ = varied_keys(rows)
    last = [key.rpartition(".")[2] for key in varied]
    headings = last if len(set(last)) == len(last) else varied
    lines = []
    for row in rows:
        chosen = [rounded(row.overrides.get(key, "")) for key in varied]
        validation, test = (
            "" if mean is None else shown_interval(mean, half_width)
            for mean, half_width in ((row.validation, row.validation_half_width), (row.test, row.test_half_width))
        )
        seconds = "" if row.seconds is None else shown(row.seconds)
        lines.append([*chosen, row.metric.replace("_", " "), validation, test, seconds, row.status])
    return [*headings, "metric", "validation", "test", "seconds", "status"], lines


def over_what(rows: Sequence[JobRow]) -> str:
    joined = any("," in row.overrides.get("seed", "") for row in rows)
    over = "seeds" if joined else "tasks; for test tasks with common sources, over these"
    return f"mean ± half width of the 95 % interval over {over}"


def sweep_table(folder: Path, rows: Sequence[JobRow]) -> Table:
    """The table for the terminal; settings that all rows share are in its title."""
    varied, shared = varied_keys(rows)
    said = " ".join(f"{key}={value}" if value else key for key, value in shared.items())
    found, (headings, lines) = titled(f"{folder} {said}".rstrip(), over_what(rows)), sweep_cells(rows)
    found.add_column("job")
    for name in headings[: len(varied)]:
        found.add_column(name, overflow="fold", max_width=40)
    for name in headings[len(varied) :]:
        right = name in ("validation", "test", "seconds")
        found.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        found.add_row(short(row.job), *line)
    return found


def short(job: str) -> str:
    """The end of a job's name, which no other job has: its settings stand in columns. Of several their number."""
    if "," in job:
        return f"{job.count(',') + 1} jobs"
    named = re.fullmatch(rf".*-([0-9a-f]{{{DIGITS}}})", Path(job).name)
    return str(Path(job).with_name(named[1])) if named else job


def rounded(value: str) -> str:
    """A number drawn by a search, with four digits; other values unchanged."""
    return shown(float(value)) if re.fullmatch(r"-?\d+\.\d{5,}(e-?\d+)?", value) else value
