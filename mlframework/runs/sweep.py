"""A sweep: the folders of its jobs, what a job leaves behind, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mlframework import processes
from mlframework.errors import FailedRun, UserError
from mlframework.files import write_json
from mlframework.runs.check_config import located
from mlframework.runs.error_report import Fault
from mlframework.runs.overrides import identity, job_name, of_run
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.sweep_report import report_sweep
from mlframework.runs.sweep_table import FINE, PLAN
from mlframework.screen import Screen

__all__ = ["AGAIN", "Job", "RememberFolder", "conclude", "current_job", "job_folder", "write_plan"]

#: What is said of a job that diverged before; it is no part of the record.
AGAIN = "; the same job would end so again: delete its folder to try it anew"


def direction(metric: str, target: str) -> str:
    """Whether a search takes a task distribution's metric up or down: `maximize` or `minimize`, as Optuna says."""
    higher_is_better = getattr(located(target), "higher_is_better", frozenset({"accuracy"}))
    return "maximize" if metric.removeprefix("query_") in higher_is_better else "minimize"


def job_folder(overrides: Sequence[str], sweep: str) -> str:
    """The folder of a job within its sweep's: named by its overrides; by a number if an older version ran it."""
    own = identity(overrides)
    for path in Path(sweep).glob("[0-9]*/overrides.yaml"):
        if path.parent.name.isdigit() and identity_in(path, path.stat().st_mtime_ns) == own:
            return path.parent.name
    return job_name(overrides)


@lru_cache(maxsize=10_000)
def identity_in(path: Path, _modified: int) -> str | None:
    """The identity of the run whose `overrides.yaml` this is; None if it cannot be read."""
    with suppress(UserError):
        return identity(RunFolder(path.parent).overrides())
    return None


OmegaConf.register_new_resolver("direction", direction, replace=True)
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class Job(NamedTuple):
    """A job of a sweep, while it runs."""

    overrides: tuple[str, ...]
    run: RunFolder

    @property
    def name(self) -> str:
        """Its folder; by a number if the command names none, and then with its overrides."""
        name = self.run.path.name
        return f"{name} ({' '.join(self.overrides)})" if name.isdigit() else name

    def record_failure(self, fault: Fault, *, diverged: bool) -> bool:
        """Writes the error to the job's folder, unless that holds another run or a damaged record; whether it did.

        Args:
            diverged: whether the same job would end so again.
        """
        try:
            if self.run.holds_run and not self.run.holds_job(self.overrides):
                return False
            if self.run.result.exists():
                self.run.read_result()
        except UserError:
            return False
        error, status = fault.line.removesuffix(AGAIN), "diverged" if diverged else "failed"
        write_json(self.run.failed, {"status": status, "overrides": self.overrides, "error": error})
        return True


@contextmanager
def current_job() -> Iterator[Job]:
    """The job that Hydra runs here, with its folder locked: the same job of another process has ended before."""
    config = HydraConfig.get()
    run = RunFolder(config.runtime.output_dir)
    with run.locked(wait=True) if processes.leads() else nullcontext():
        yield Job(tuple(of_run(config.overrides.task)), run)


def write_plan(sweep: Path, jobs: Sequence[Sequence[str]]) -> None:
    """Writes the overrides of a sweep's jobs, so that its table names those that have not started."""
    write_json(sweep / PLAN, [of_run(overrides) for overrides in jobs])


class RememberFolder(Callback):
    """Remembers the folder of this process's sweep for `conclude`."""

    running: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        RememberFolder.running = Path(config.hydra.sweep.dir)
        if Screen.current is not None:
            Screen.current.idle = f"sweep in {config.hydra.sweep.dir}"


def conclude() -> int:
    """Prints and writes the table of the sweep that this process launched, if any; 1 if one of its jobs failed."""
    folder, RememberFolder.running = RememberFolder.running, None
    rows = report_sweep(folder) if folder is not None and folder.is_dir() else []
    return 0 if all(row.status in FINE for row in rows) else FailedRun.exit_code
