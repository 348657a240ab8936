"""Over-fitting in two kinds: to the support set of a task, and to the tasks of meta-training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlframework.episode import Episode, Split
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.part import Measure
from mlframework.evaluation.report import Measured
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics

__all__ = ["OverFitting"]


class OverFitting(Measure):
    """Scores on support and query sets, of training tasks and of the split that is judged, after each inner step.

    To the support set: query loss minus support loss of the same task. To the training tasks: query loss of the judged
    tasks minus that of training tasks. With `train_tasks`, training tasks are the fixed ones.

    A column is a score of a part of an episode, as `query_loss` and `support_loss`; a row is a split after some steps.

    Args:
        tasks: drawn of each split.
        seed: of the draws.
    """

    def __init__(self, *, tasks: int, seed: int) -> None:
        self.tasks, self.seed = at_least("tasks", tasks, 2), seed

    def measure(self, meta_layer: MetaLayer, split: Split, steps: int) -> Measured:
        most = max(steps, meta_layer.test_inner_steps)
        columns: dict[str, dict[str, Interval]] = {}
        for each in dict.fromkeys(("train", split)):
            tasks = TaskSet(meta_layer.task, each, tasks=self.tasks, seed=self.seed)
            for name, by_step in self.scores(meta_layer, tasks, most).items():
                rows = {f"{each}, {step} steps": Interval.of(values) for step, values in enumerate(by_step)}
                columns.setdefault(name, {}).update(rows)
        return Measured(f"support and query of train and {split} tasks", columns)

    def scores(self, meta_layer: MetaLayer, tasks: TaskSet, steps: int) -> dict[str, Tensor]:
        """Each score of each task by inner steps, `[steps + 1, tasks]`."""
        device = next(meta_layer.parameters(), torch.empty(0)).device
        meta_layer.eval()
        with torch.no_grad():
            found = [list(scores_by_step(meta_layer, episode.to(device), steps)) for episode in tasks]
        joined = [
            {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
            for parts in zip(*found, strict=True)
        ]
        return {name: torch.stack([row[name] for row in joined]) for name in joined[0]}


def scores_by_step(meta_layer: MetaLayer, episode: Episode, steps: int) -> Iterator[Metrics]:
    """The scores `[tasks]` of query and support set after 0, 1, ... inner steps, and the difference of the losses."""
    on_support = Episode(episode.support, episode.support)
    for adapted in meta_layer.trajectory(episode.support, steps):
        query = meta_layer.query_metrics(adapted, episode)
        support = meta_layer.query_metrics(adapted, on_support)
        renamed = {name.replace("query_", "support_"): value for name, value in support.items()}
        yield {**renamed, **query, "query_minus_support_loss": query["query_loss"] - support["query_loss"]}
