"""Each job as a task of Ray, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn

from mlframework.errors import FailedRun, InvalidValue
from mlframework.runs.launchers.launcher import HydraJob, JobLauncher, check_least, failure

__all__ = ["RayLauncher"]

#: The least values of the launcher's numbers. Ray counts in steps of 0.0001, and a job takes a part of a core at least.
LEAST = {"ranks_per_job": 1, "cpus": 1, "gpus": 0, "cpus_per_job": 0.0001, "gpus_per_job": 0.0}


class RayLauncher(JobLauncher):
    """A Ray task for each process of a job, as many jobs at a time as there are cores and GPUs for them.

    Args:
        address: of a running cluster, whose machines share the sweep's folder; null starts Ray on this machine.
        cpus, gpus: of the machine that is started; null: all.
        ranks_per_job: processes of a job, which share its tasks.
        cpus_per_job, gpus_per_job: what each process of a job takes.
    """

    name = "ray"
    package = "ray"
    extra = "ray"

    def __init__(
        self,
        address: str | None,
        cpus: int | None,
        gpus: int | None,
        cpus_per_job: float,
        gpus_per_job: float,
        ranks_per_job: int = 1,
    ) -> None:
        machine, of_job = {"cpus": cpus, "gpus": gpus}, {"cpus_per_job": cpus_per_job, "gpus_per_job": gpus_per_job}
        check_least(LEAST, {**machine, **of_job, "ranks_per_job": ranks_per_job})
        self.ranks = ranks_per_job
        self.machine = {"num_cpus": cpus, "num_gpus": gpus} if address is None else {"address": address}
        self.of_job = {"num_cpus": cpus_per_job, "num_gpus": gpus_per_job, "max_retries": 0}

    def run(self, jobs: Sequence[HydraJob]) -> Iterator[tuple[HydraJob, JobReturn]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report each use to its makers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns that this will change
        import ray

        try:
            ray.init(include_dashboard=False, logging_level=logging.ERROR, **self.machine)
        except Exception as error:  # Ray raises bare ones
            raise FailedRun(f"launcher=ray: Ray does not start: {error}") from error
        try:
            self.check_room(ray.cluster_resources())
            started = {job.number: (job, *self.start(job)) for job in jobs}
            waiting = {task: job.number for job, tasks, _ in started.values() for task in tasks}
            while waiting:
                (ended, *_), _ = ray.wait(list(waiting))
                number = waiting.pop(ended)
                if number not in waiting.values():
                    job, tasks, group = started.pop(number)
                    if group is not None:
                        ray.util.remove_placement_group(group)
                    yield job, outcome(job, tasks)
        finally:
            ray.shutdown()

    def check_room(self, there: Mapping[str, float]) -> None:
        """Refuses a job for which Ray would wait for ever on this machine; a cluster may grow."""
        for name, setting, of_job in (("CPU", "cpus_per_job", "num_cpus"), ("GPU", "gpus_per_job", "num_gpus")):
            needs, has = self.ranks * self.of_job[of_job], there.get(name, 0)
            if "address" not in self.machine and needs > has:
                why = f"a job (ranks_per_job={self.ranks}) needs {needs:g} {name}s, and this machine has {has:g}"
                raise InvalidValue(f"hydra.launcher.{setting}", self.of_job[of_job], why)

    def start(self, job: HydraJob) -> tuple[list[Any], Any]:
        """The tasks of a job, one for each of its processes, and the machines' parts that are kept free for them."""
        import ray

        remote: Any = ray.remote
        if self.ranks == 1:
            return [remote(**self.of_job)(call).remote(job)], None
        part = {"CPU": self.of_job["num_cpus"], "GPU": self.of_job["num_gpus"]}
        group = ray.util.placement_group([{name: n for name, n in part.items() if n}] * self.ranks)

        def within(rank: int) -> dict[str, Any]:
            # A process of its own for each task: one that was a rank of another job would still be of that job.
            placed = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, rank)
            return {**self.of_job, "scheduling_strategy": placed, "max_calls": 1}

        address = remote(**within(0))(free_address).remote()
        return [remote(**within(r))(as_rank).remote(job, r, self.ranks, address) for r in range(self.ranks)], group


def outcome(job: HydraJob, tasks: Sequence[Any]) -> JobReturn:
    """What a job gave in its first process, once all its tasks have ended."""
    import ray

    try:
        return ray.get(list(tasks))[0]
    except ray.exceptions.RayError as error:
        return failure(job, error)


def free_address() -> tuple[str, int]:
    """An address on the machine of the first rank, at which the ranks find each other."""
    import ray

    with socket.socket() as found:
        found.bind(("", 0))
        return ray.util.get_node_ip_address(), found.getsockname()[1]


def as_rank(job: HydraJob, rank: int, count: int, address: tuple[str, int]) -> JobReturn:
    """Runs a job as one of its processes."""
    place = {"MASTER_ADDR": address[0], "MASTER_PORT": address[1], "RANK": rank, "WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    return job()


def call(job: HydraJob) -> JobReturn:
    return job()
