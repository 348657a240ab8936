"""One job after another, in the process of the sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra.core.utils import JobReturn

from mlframework.runs.launchers.launcher import HydraJob, JobLauncher

__all__ = ["InTurnLauncher"]


class InTurnLauncher(JobLauncher):
    """One job after another. Two sweeps in one folder share the work: each takes a job that the other does not run."""

    name = "basic"

    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        left = list(jobs)
        while left:
            job = next((job for job in left if not job.in_use), left[0])
            left.remove(job)
            yield job, job.here()
