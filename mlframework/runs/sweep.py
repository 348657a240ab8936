"""The result of a sweep: a table of its jobs in the terminal, and `sweep.csv` in its folder."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from mlframework.errors import FailedRun, UserError
from mlframework.evaluation.number_format import shown, shown_interval
from mlframework.files import atomic, write_json
from mlframework.runs.check_config import located
from mlframework.runs.error_report import Fault
from mlframework.runs.run_folder import RunFolder, locked_folder
from mlframework.runs.tables import print_table, titled
from mlframework.screen import Screen

__all__ = ["Job", "JobRow", "RememberFolder", "conclude", "grouped", "read_rows"]

#: The error of a job whose folder holds another's run; it lies in the sweep's folder until the sweep ends.
REFUSED = "refused.{}.json"


def direction(metric: str, target: str) -> str:
    """Whether a search takes a task distribution's metric up or down: `maximize` or `minimize`, as Optuna says."""
    higher_is_better = getattr(located(target), "higher_is_better", frozenset({"accuracy"}))
    return "maximize" if metric.removeprefix("query_") in higher_is_better else "minimize"


OmegaConf.register_new_resolver("direction", direction, replace=True)


class Job(NamedTuple):
    """A job of a sweep, while it runs: its number in the order of the launches, and its own and the sweep's folder."""

    number: int
    overrides: tuple[str, ...]
    run: RunFolder
    sweep: Path

    @classmethod
    def current(cls) -> Job:
        config = HydraConfig.get()
        run = RunFolder(config.runtime.output_dir)
        run.held.discard(run.path.resolve())  # by an earlier job of this process
        overrides = tuple(override for override in config.overrides.task if not override.startswith("resume="))
        return cls(config.job.num, overrides, run, Path(config.sweep.dir))

    def record_failure(self, fault: Fault) -> None:
        """Writes the error to the job's folder, or to the sweep's if the job's holds the run of another launch."""
        content = {"status": "failed", "overrides": self.overrides, "error": fault.line}
        refused = self.run.holds_run and self.run.path.resolve() not in self.run.held
        write_json(self.sweep / REFUSED.format(self.number) if refused else self.run.failed, content)


class RememberFolder(Callback):
    """Remembers the folder of this process's sweep for `conclude`, and keeps a second sweep out of it."""

    running: ClassVar[tuple[Path, IO[str]] | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            lock = locked_folder("hydra.sweep.dir", folder, "another sweep is running in this folder")
        except UserError as error:
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from None  # Hydra would make a warning of an Exception
        RememberFolder.running = folder, lock
        if Screen.current is not None:
            Screen.current.idle = f"sweep in {folder}"
        for path in folder.glob(REFUSED.format("*")):
            path.unlink()


class JobRow(NamedTuple):
    """A line of the table."""

    job: str  # its folder within the sweep's
    status: str  # finished, failed, lost if it left no record, or damaged if its record cannot be read
    overrides: dict[str, str]
    metric: str = ""  # the monitored validation metric
    mean: float | None = None  # of the metric over validation tasks; None if it is not finite
    half_width: float | None = None  # of its 95 % interval
    seconds: float | None = None  # spent training
    error: str = ""


def conclude() -> int:
    """Prints and writes the table of the sweep that this process launched, if any; 1 if one of its jobs failed."""
    running, RememberFolder.running = RememberFolder.running, None
    if running is None:
        return 0
    folder, lock = running
    with lock:
        rows, refused = read_rows(folder), sorted(folder.glob(REFUSED.format("*")))
        if not rows:
            return 0
        groups = grouped(rows)
        write_csv(folder / "sweep.csv", groups)
        if groups != rows:
            write_csv(folder / "sweep_jobs.csv", rows)
        print_table(table(folder, groups))
        for row in rows:
            if row.error:
                print(f"job {row.job}: {row.error}")
        for path in refused:  # its line stands on stderr
            path.unlink()
    return FailedRun.exit_code if refused or any(row.status != "finished" for row in rows) else 0


def read_rows(folder: Path) -> list[JobRow]:
    jobs = {path.parent for mark in ("result.json", "failed.json", "config.yaml") for path in folder.rglob(mark)}
    return [read_row(job, folder) for job in sorted(jobs, key=lambda job: natural(str(job)))]


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which 10 comes after 9."""
    return [(int(digits or 0), other) for digits, other in re.findall(r"(\d+)|(\D+)", text)]


def read_row(job: Path, folder: Path) -> JobRow:
    name, run = str(job.relative_to(folder)), RunFolder(job)
    started: dict[str, str] = {}
    file = run.failed if run.failed.exists() else run.result
    with suppress(UserError):  # they cannot be read
        started = by_key(run.overrides())
    if not file.exists():
        return JobRow(name, "lost", started, error="ended without a word: was it killed?")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        row = JobRow(name, record["status"], by_key(record["overrides"]))
        if "error" in record:
            return row._replace(error=record["error"])
        found = record["validation"][record["monitor"]]
        numbers = found["mean"], found["half_width"], record["seconds"]
        mean, half_width, seconds = (n if n is not None and math.isfinite(n) else None for n in numbers)
        return row._replace(metric=record["monitor"], mean=mean, half_width=half_width, seconds=seconds)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return JobRow(name, "damaged", started, error=f"damaged: {file}")


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """`["a.b=1"]` as `{"a.b": "1"}`."""
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}


def grouped(rows: Sequence[JobRow]) -> list[JobRow]:
    """A row for all seeds of the same overrides, with the interval over seeds; a single seed keeps that over tasks."""
    groups: dict[tuple[tuple[str, str], ...], list[JobRow]] = {}
    for row in rows:
        of_seed = tuple(pair for pair in row.overrides.items() if pair[0] != "seed")
        same = of_seed if row.overrides else (("job", row.job),)  # a damaged record: no seed of anything
        groups.setdefault(same, []).append(row)
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
    import torch

    from mlframework.evaluation.interval import Interval

    # With one value that is not finite there is no mean: the mean of the other seeds would flatter.
    values = [math.nan if row.mean is None else row.mean for row in finished]
    interval = Interval.of(torch.tensor(values, dtype=torch.float64))
    mean, half_width = (value if math.isfinite(value) else None for value in (interval.mean, interval.half_width))
    seconds = sum(row.seconds or 0.0 for row in finished)
    return row._replace(metric=finished[0].metric, mean=mean, half_width=half_width, seconds=seconds)


def write_csv(path: Path, rows: Sequence[JobRow]) -> None:
    """Writes a column for every overridden key, between the job and its result."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "status", *keys, *JobRow._fields[3:]])
        for job, status, overrides, *outcome in rows:
            writer.writerow([job, status, *(overrides.get(key, "") for key in keys), *outcome])


def table(folder: Path, rows: Sequence[JobRow]) -> Table:
    """The table for the terminal: a column for every key in which rows differ; shared overrides are in the title."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    same = {key: {row.overrides.get(key, "") for row in rows if row.overrides} for key in keys}
    shared = " ".join(f"{key}={values.pop()}" for key, values in same.items() if len(values) == 1)
    varied = [key for key, values in same.items() if len(values) > 1]
    over = "seeds" if any("," in row.overrides.get("seed", "") for row in rows) else "validation tasks"
    found = titled(f"{folder} {shared}".rstrip(), f"mean ± half width of the 95 % interval over {over}")
    found.add_column("job", justify="right")
    last = [key.rpartition(".")[2] for key in varied]
    for name in last if len(set(last)) == len(last) else varied:
        found.add_column(name, overflow="fold", max_width=40)
    for name in ("metric", "value", "seconds", "status"):
        found.add_column(name, justify="right" if name in ("value", "seconds") else "left", no_wrap=True)
    for row in rows:
        chosen = [rounded(row.overrides.get(key, "")) for key in varied]
        value = "" if row.mean is None else shown_interval(row.mean, row.half_width)
        seconds = "" if row.seconds is None else shown(row.seconds)
        found.add_row(row.job, *chosen, row.metric.replace("_", " "), value, seconds, row.status)
    return found


def rounded(value: str) -> str:
    """A number drawn by a search, with four digits; other values unchanged."""
    return shown(float(value)) if re.fullmatch(r"-?\d+\.\d{5,}(e-?\d+)?", value) else value
