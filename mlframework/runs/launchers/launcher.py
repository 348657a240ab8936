"""What all launchers share: the jobs of a sweep, and one line where a package is missing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from mlframework import processes
from mlframework.errors import InvalidValue, UserError
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.sweep import job_folder, write_plan
from mlframework.screen import Screen

__all__ = ["HydraJob", "JobLauncher", "check_jobs", "check_least", "failure", "require"]

#: Hydra's own sweeper, which knows all jobs before the first one starts.
GRID = "BasicSweeper"


@dataclass(frozen=True)
class HydraJob:
    """One job of a sweep, which any process can run.

    Attributes:
        number: its place in the order of the launches.
        state: Hydra's, for another process.
    """

    number: int
    overrides: tuple[str, ...]
    context: HydraContext
    config: DictConfig
    function: TaskFunction
    state: Any

    @property
    def in_use(self) -> bool:
        """Whether another process runs this job."""
        folder = Path(self.config.hydra.sweep.dir)
        return RunFolder(folder / job_folder(self.overrides, str(folder))).in_use

    def here(self) -> JobReturn:
        """Runs the job in the process of the sweep."""
        config = self.context.config_loader.load_sweep_config(self.config, list(self.overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        result = run_job(
            task_function=self.function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.context,
        )
        result.cfg = result.hydra_cfg = None  # a sweep holds all of its results, and each config takes 0.3 MB
        return result

    def __call__(self) -> JobReturn:
        """Runs the job in another process, or in each of several that share its tasks."""
        setup_globals()
        Singleton.set_state(self.state)
        with processes.one_speaks(), processes.joined():
            return self.here()


class JobLauncher(Launcher):
    """Runs the jobs of a sweep; a launcher adds where they run, and how many at a time."""

    #: How the user names the launcher, the package that it needs, and the extra that brings it.
    name: ClassVar[str]
    package: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.function, self.config = hydra_context, task_function, config
        self.planned: list[Sequence[str]] = []
        self.launched = self.ended = 0
        if self.package:
            require(self.package, f"launcher={self.name}", self.extra)

    @abstractmethod
    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        """Runs all jobs; pairs in any order. A job that was killed gives a `failure`, and does not stop the others."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep = Path(self.config.hydra.sweep.dir)
        if self.config.hydra.sweeper._target_.endswith(f".{GRID}"):
            self.planned += job_overrides
            write_plan(sweep, self.planned)
        state = Singleton.get_state()
        jobs = [
            HydraJob(number, tuple(overrides), self.context, self.config, self.function, state)
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        self.launched += len(jobs)
        self.tell()
        results = {}
        # Jobs that another process runs come last: meanwhile the others are done.
        for job, result in self.run(sorted(jobs, key=lambda job: job.in_use)):
            results[job.number] = result
            self.ended += 1
            self.tell()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return [results[job.number] for job in jobs]

    def tell(self) -> None:
        """Shows how many jobs have ended wherever no job of this process is at work; a search launches more later."""
        if Screen.current is not None:
            count = f"{self.ended} of {self.launched} jobs"
            Screen.current.idle = f"sweep in {self.config.hydra.sweep.dir}: {count} have ended"


def check_least(least: Mapping[str, float], settings: Mapping[str, Any]) -> None:
    """Refuses a setting that is no number, or below its least value; null and a setting that is not there pass.

    A whole number as the least value, such as 1, takes whole numbers alone; 1.0 takes fractions.
    """
    for name, lowest in least.items():
        value = settings.get(name)
        whole = isinstance(lowest, int)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise InvalidValue(name, value, f"must be a {'whole ' if whole else ''}number of at least {lowest:g}")
        if not value >= lowest:
            raise InvalidValue(name, value, f"must be at least {lowest:g}")


def check_jobs(n_jobs: object) -> None:
    """Refuses a number of jobs at a time that no machine can run."""
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or not (n_jobs >= 1 or n_jobs == -1):
        raise InvalidValue("n_jobs", n_jobs, "must be a whole number of at least 1, or -1 for one per core")


def failure(job: HydraJob, why: object) -> JobReturn:
    """What a job gives that was killed; a line says so. Its folder shows how far it came."""
    said = next(iter(str(why).strip().splitlines()), "")
    print(f"job {job.number} ({' '.join(job.overrides)}): ended without a word: was it killed? {said}".rstrip())
    return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)


def require(package: str, asked: str, extra: str | None) -> None:
    """A line that names the extra which brings a package that is missing."""
    try:
        import_module(package)
    except ImportError as error:
        raise UserError(f"{asked}: needs an extra: pip install 'mlframework[{extra}]' ({error})") from error
