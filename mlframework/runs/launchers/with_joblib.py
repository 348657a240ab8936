"""Several jobs at a time in the worker processes of joblib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra.core.utils import JobReturn

from mlframework.runs.launchers.launcher import HydraJob, JobLauncher, check_jobs, failure

__all__ = ["JoblibLauncher"]


class JoblibLauncher(JobLauncher):
    """`n_jobs` workers on this machine; -1 is one for each core. They run one job after another, and share the cores.

    When a worker is killed, joblib gives up all jobs that have not ended; the same command runs them.
    """

    name = "joblib"
    package = "joblib"

    def __init__(self, n_jobs: int) -> None:
        check_jobs(n_jobs)
        self.n_jobs = n_jobs

    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        from concurrent.futures.process import BrokenProcessPool

        from joblib import Parallel, delayed

        left = {job.number: job for job in jobs}
        try:
            calls = (delayed(numbered)(job) for job in jobs)
            for number, result in Parallel(self.n_jobs, backend="loky", return_as="generator_unordered")(calls):
                yield left.pop(number), result
        except BrokenProcessPool as error:
            yield from ((job, failure(job, error)) for job in left.values())


def numbered(job: HydraJob) -> tuple[int, JobReturn]:
    return job.number, job()
