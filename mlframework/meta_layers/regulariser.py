"""The interface of regularisers: parts that change meta-training, against over-fitting to its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mlframework import processes
from mlframework.episode import Episode, Kind
from mlframework.errors import UserError
from mlframework.files import KeepsArguments
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["LossFn", "Regulariser"]

#: The meta-loss of each task of an episode `[tasks]`, and the metrics.
LossFn = Callable[[Episode], tuple[Tensor, dict[str, Tensor]]]


class Regulariser(KeepsArguments, nn.Module):
    """Changes the episodes or the loss of meta-training; validation, evaluation and use do without it.

    Its own parameters are meta-parameters. Random numbers come from the generator that `before_step` gets: those that
    the loss needs go into buffers, so that a compiled step sees new ones each time.

    Wherever a method takes a `meta_layer`, that is the `MetaLayer` in training.
    """

    #: The kinds of task that it is for.
    kinds: tuple[Kind, ...] = get_args(Kind)
    #: Whether its loss compares the tasks of a meta-batch, which one process then has to take at once.
    compares_tasks: bool = False

    def check(self, task: TaskDistribution) -> None:
        """Refuses a task that the regulariser is not for: a `UserError` says why."""
        if task.spec.kind not in self.kinds:
            raise UserError(f"is for a {' or a '.join(self.kinds)}, and {type(task).__name__} is a {task.spec.kind}")
        if self.compares_tasks and processes.count() > 1:
            raise UserError(f"compares the tasks of a meta-batch, which {processes.count()} processes share: use one")

    # `Any` for MetaLayer: its module imports this one.
    def attach(self, meta_layer: Any) -> None:
        """Makes what the regulariser needs for an algorithm, once; refuses one that it does not go with."""

    def before_step(self, meta_layer: Any, episode: Episode, generator: torch.Generator) -> Episode:
        """The episode `[tasks, ...]` to train on in place of the one that was drawn, on the CPU."""
        return episode

    def meta_loss(self, meta_layer: Any, episode: Episode, loss_of: LossFn) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss `[tasks]` that the outer loop differentiates, given that without this regulariser; the metrics."""
        return loss_of(episode)
