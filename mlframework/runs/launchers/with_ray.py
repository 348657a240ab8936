"""Each job as a task of Ray, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.utils import JobReturn

from mlframework.errors import FailedRun
from mlframework.runs.launchers.launcher import HydraJob, JobLauncher, failure

__all__ = ["RayLauncher"]


class RayLauncher(JobLauncher):
    """A Ray task for each job, as many at a time as there are cores and GPUs for them.

    Args:
        address: of a running cluster, whose machines share the sweep's folder; null starts Ray on this machine.
        cpus, gpus: of the machine that is started; null: all.
        cpus_per_job, gpus_per_job: what a job takes.
    """

    name = "ray"
    package = "ray"
    extra = "ray"

    def __init__(
        self, address: str | None, cpus: int | None, gpus: int | None, cpus_per_job: float, gpus_per_job: float
    ) -> None:
        self.machine = {"num_cpus": cpus, "num_gpus": gpus} if address is None else {"address": address}
        self.of_job = {"num_cpus": cpus_per_job, "num_gpus": gpus_per_job, "max_retries": 0}

    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report each use to its makers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns that this will change
        import ray

        remote: Any = ray.remote
        try:
            ray.init(include_dashboard=False, logging_level=logging.ERROR, **self.machine)
        except Exception as error:  # Ray raises bare ones
            raise FailedRun(f"launcher=ray: Ray does not start: {error}") from error
        try:
            task = remote(**self.of_job)(call)
            tasks = {task.remote(job): job for job in jobs}
            while tasks:
                (ended, *_), _ = ray.wait(list(tasks))
                job = tasks.pop(ended)
                yield job, outcome(job, ended)
        finally:
            ray.shutdown()


def outcome(job: HydraJob, ended: Any) -> JobReturn:
    """What a job gave, once its task has ended."""
    import ray

    try:
        return ray.get(ended)
    except ray.exceptions.RayError as error:
        return failure(job, error)


def call(job: HydraJob) -> JobReturn:
    return job()
