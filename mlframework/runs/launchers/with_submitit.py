"""Each job in a process of its own, on this machine or on a SLURM cluster."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from mlframework.errors import UserError
from mlframework.runs.launchers.launcher import HydraJob, JobLauncher, check_jobs, check_least, failure

__all__ = ["SlurmLauncher", "SubmititLauncher"]

#: Seconds between two looks at the processes.
PAUSE = 0.2

#: The least values of numbers of submitit's executor. A whole number here takes whole numbers alone.
LEAST = {
    **{"nodes": 1, "tasks_per_node": 1, "timeout_min": 1, "cpus_per_task": 1, "gpus_per_node": 0, "mem_gb": 0.001},
    **{"slurm_array_parallelism": 1, "slurm_signal_delay_s": 0},
}


@dataclass(frozen=True)
class ClusterJob:
    """A job as submitit runs it, in each of its processes."""

    job: HydraJob

    def __call__(self) -> JobReturn:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return self.job()

    def checkpoint(self) -> Any:
        """The job again, when a cluster takes the machine away: it goes on at its last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SubmititLauncher(JobLauncher):
    """Each job in `tasks_per_node` processes on this machine, `n_jobs` jobs at a time; -1 is one for each core.

    Args:
        folder: for what the jobs print.
        parameters: of submitit's executor; null is its default.
    """

    name = "submitit"
    package = "submitit"
    extra = "sweep"
    cluster = "local"

    def __init__(self, folder: str, n_jobs: int = -1, **parameters: Any) -> None:
        check_jobs(n_jobs)
        check_least(LEAST, parameters)
        self.folder, self.n_jobs = folder, n_jobs
        self.parameters = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in parameters.items()
            if value is not None
        }

    def executor(self) -> Any:
        import submitit

        executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster)
        executor.update_parameters(**self.parameters)
        return executor

    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        executor, left = self.executor(), iter(jobs)
        most = self.n_jobs if self.n_jobs > 0 else os.cpu_count() or 1
        running = [(job, executor.submit(ClusterJob(job))) for job in islice(left, most)]
        while running:
            ended = [pair for pair in running if pair[1].done()]
            running = [pair for pair in running if pair not in ended]
            running += [(job, executor.submit(ClusterJob(job))) for job in islice(left, len(ended))]
            yield from ((job, outcome(job, submitted)) for job, submitted in ended)
            time.sleep(PAUSE)


class SlurmLauncher(SubmititLauncher):
    """All jobs as one array of a SLURM cluster, which takes `slurm_array_parallelism` at a time."""

    name = "slurm"
    cluster = "slurm"

    def setup(self, **parts: Any) -> None:
        super().setup(**parts)
        if shutil.which("sbatch") is None:
            raise UserError("launcher=slurm: there is no sbatch here: start the sweep on a login node of the cluster")

    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        import submitit

        executor = self.executor()
        with executor.batch():
            submitted = {executor.submit(ClusterJob(job)): job for job in jobs}
        for each in submitit.helpers.as_completed(list(submitted)):
            yield submitted[each], outcome(submitted[each], each)


def outcome(job: HydraJob, submitted: Any) -> JobReturn:
    """What a job gave in its first process, once all of them have ended."""
    import submitit

    try:
        return submitted.results()[0]
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        return failure(job, error)
