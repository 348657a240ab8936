"""Judging an algorithm: a frozen, hashed set of tasks, query metrics after every inner step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, replace

import torch

from mlframework import processes
from mlframework.episode import Episode, Split
from mlframework.evaluation.interval import Sources
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics
from mlframework.screen import stage
from mlframework.tasks.on_features import on_features
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["VALIDATION_SEED", "TaskSet", "judge_by_step", "over_ranks", "policies", "task_values"]

#: Validation tasks come from their own generator, so that they are the same for every run and every method.
VALIDATION_SEED = 1


@dataclass(frozen=True)
class TaskSet:
    """A frozen set of tasks: same seed, same tasks, on any machine, whatever the training drew.

    Tasks are drawn one at a time, so neither their number nor the chunk changes the first ones.
    """

    task: TaskDistribution
    split: Split
    _: KW_ONLY
    tasks: int
    seed: int  # of the draws
    chunk: int = 50  # tasks at a time when they are used
    start: int = 0  # tasks of these draws that come before the first one

    def __post_init__(self) -> None:
        at_least("tasks", self.tasks, 1)
        at_least("chunk", self.chunk, 1)

    def __iter__(self) -> Iterator[Episode]:
        with stage("tasks", self.tasks) as at:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.start):
                self.task.sample(1, self.split, generator)
            for start in range(0, self.tasks, self.chunk):
                count = min(self.chunk, self.tasks - start)
                yield Episode.stack([self.task.sample(1, self.split, generator) for _ in range(count)])
                at.done += count

    def first(self, tasks: int) -> TaskSet:
        """The set of its first tasks."""
        return replace(self, tasks=min(tasks, self.tasks))

    def part(self, tasks: slice) -> TaskSet:
        """The set of some of its tasks, from the first to the one after the last."""
        return replace(self, start=self.start + tasks.start, tasks=tasks.stop - tasks.start)

    def sources(self) -> Sources | None:
        """The sources of each task; None where each task is a source of its own."""
        generator, found = torch.Generator().manual_seed(self.seed), []
        for _ in range(self.start):
            self.task.sample(1, self.split, generator)
        for _ in range(self.tasks):
            before = generator.get_state()
            names = self.task.drawn_from(1, self.split, generator)
            if names is None:
                return None
            found += names
            self.task.sample(1, self.split, generator.set_state(before))
        return found

    def hash(self) -> str:
        """Sixteen hexadecimal digits that stand for all the tasks, whatever the chunk."""
        digest = hashlib.sha256()
        for episode in self:
            for part in episode.chunks(1):
                digest.update(part.hash().encode())
        return digest.hexdigest()[:16]


def over_ranks(judge: Callable[[TaskSet], Metrics], tasks: TaskSet) -> Metrics:
    """What judging every task of a set gives, `[steps, tasks]`, in each rank; each judges its share of the tasks.

    Random numbers of torch are afterwards those of rank 0 in all ranks: a baseline draws its networks from them.
    """
    if processes.count() == 1:
        return judge(tasks)
    rows = processes.share(tasks.tasks)
    values = judge(tasks.part(rows)) if rows.start < rows.stop else None
    found = processes.gathered((values, torch.get_rng_state()))
    torch.set_rng_state(found[0][1])
    parts = [values for values, _ in found if values is not None]
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def policies(meta_layer: MetaLayer) -> tuple[BatchNormPolicy, ...]:
    """The policies by which queries are judged: one with, one without sight of the other queries."""
    if not meta_layer.base_layer.mixes_examples:
        return (meta_layer.batch_norm,)
    return ("support", "transductive") if meta_layer.batch_norm == "support" else ("transductive", "inductive")


def judge_by_step(
    meta_layer: MetaLayer,
    episode: Episode,
    steps: int,
    batch_norm: BatchNormPolicy | None = None,
    *,
    ends_only: bool = False,
) -> Metrics:
    """Query metrics after 0, 1, ..., `steps` inner steps, each `[steps + 1, tasks]` (one row if nothing is stepped).

    The policy None is the algorithm's own. `ends_only` judges after 0 and `steps` alone: two rows.
    """
    meta_layer.eval()
    with torch.no_grad():
        rows = [
            meta_layer.query_metrics(adapted, episode, batch_norm)
            for step, adapted in enumerate(meta_layer.trajectory(episode.support, steps))
            if not ends_only or step in (0, steps)
        ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def task_values(
    meta_layer: MetaLayer,
    tasks: TaskSet,
    steps: int,
    *,
    device: torch.device,
    batch_norm: BatchNormPolicy | None = None,
    ends_only: bool = False,
) -> Metrics:
    """Each query metric of every task of a set by inner steps, `[steps + 1, tasks]` on the CPU; see `judge_by_step`."""
    drawn = replace(tasks, task=on_features(tasks.task, meta_layer.base_layer))
    judged = [
        judge_by_step(meta_layer, episode.to(device), steps, batch_norm, ends_only=ends_only) for episode in drawn
    ]
    return {name: torch.cat([part[name].cpu() for part in judged], dim=1) for name in judged[0]}
