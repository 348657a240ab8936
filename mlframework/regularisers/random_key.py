"""Meta-augmentation of a regression: a random key changes all targets of a task."""

from __future__ import annotations

import torch

from mlframework.episode import Episode
from mlframework.errors import UserError
from mlframework.inner_loop.inner_update import positive
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.meta_layers.regulariser import Regulariser
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["RandomKey", "RandomTurn"]


class RandomKey(Regulariser):
    """Adds a number to all targets of a task, drawn anew each time: only the support set tells which.

    A network cannot then learn the targets of the training tasks by heart. Each output has a key of its own.

    Args:
        size: keys are uniform from 0 to it.
        period: targets are taken modulo it, as angles are; None: they are not.

    Reference: Rajendran, Irpan, Jang, Meta-Learning Requires Meta-Augmentation, 2020, arXiv:2007.05549
        (for the pose regression: `y + key` modulo the period).
    """

    kinds = ("regression",)

    def __init__(self, *, size: float, period: float | None = None) -> None:
        super().__init__()
        self.size = positive("size", size)
        self.period = None if period is None else positive("period", period)

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        outputs = meta_layer.task.spec.out_features
        key = self.size * torch.rand(episode.num_tasks, 1, outputs, generator=generator)
        moved = ((part, part.y + key.to(part.y.dtype)) for part in episode)
        return Episode(*(part._replace(y=y if self.period is None else y % self.period) for part, y in moved))


class RandomTurn(Regulariser):
    """Turns all targets of a task, which are points in a plane, by one random angle: a `RandomKey` for directions.

    Reference: Rajendran, Irpan, Jang, Meta-Learning Requires Meta-Augmentation, 2020, arXiv:2007.05549. Deviation: the
        key turns a direction, where the paper adds it to the angle.
    """

    kinds = ("regression",)

    def check(self, task: TaskDistribution) -> None:
        super().check(task)
        if task.spec.out_features != 2:
            raise UserError(f"turns points in a plane, and {type(task).__name__} has {task.spec.out_features} outputs")

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        angle = 2 * torch.pi * torch.rand(episode.num_tasks, 1, generator=generator)
        c, s = angle.cos(), angle.sin()

        def turned(y: torch.Tensor) -> torch.Tensor:
            first, second = y.unbind(-1)
            return torch.stack([c * first - s * second, s * first + c * second], -1).to(y.dtype)

        return Episode(*(part._replace(y=turned(part.y)) for part in episode))
