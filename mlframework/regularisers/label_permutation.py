"""Label permutation: within each task, or between the tasks of a meta-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import UserError
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.meta_layers.regulariser import Regulariser

__all__ = ["LabelPermutation", "permutations", "same_labels"]


class LabelPermutation(Regulariser):
    """Gives each task its classes in a new order, so that no class keeps its number.

    Args:
        between: whether classes change tasks, too: each class of a new task comes from a random task of the meta-batch,
            in which it had the same number. Two classes of a new task may then be the same, as rarely as two tasks
            share a class.

    Reference: Rajendran, Irpan, Jang, Meta-Learning Requires Meta-Augmentation, 2020, arXiv:2007.05549
        (intrashuffle, and with `between` intershuffle). Deviation: classes change tasks within a meta-batch.
    """

    kinds = ("classification",)

    def __init__(self, *, between: bool = False) -> None:
        super().__init__()
        self.between = between

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        n_way = meta_layer.task.spec.out_features
        if self.between:
            same_labels(episode)
            source = permutations(n_way, episode.num_tasks, generator)  # of each class, a task for each task
            episode = Episode(*(exchanged(part, source) for part in episode))
        order = permutations(episode.num_tasks, n_way, generator)
        return Episode(*(part._replace(y=order.gather(1, part.y)) for part in episode))


def exchanged(examples: Examples, source: Tensor) -> Examples:
    """The rows of class `c` in task `t` become those of task `source[c, t]`; `source` is `[classes, tasks]`."""
    tasks = torch.arange(len(examples.y))[:, None]
    came_from = source[examples.y, tasks]  # [tasks, n]
    rows = torch.arange(examples.y.shape[1])
    return Examples(examples.x[came_from, rows], examples.y, examples.mask[came_from, rows])


def permutations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random orders of the numbers below `size`, `[count, size]`."""
    return torch.rand(count, size, generator=generator).argsort(1)


def same_labels(episode: Episode) -> None:
    """Refuses tasks whose rows differ in their labels: their classes cannot be paired row by row."""
    if any((part.y != part.y[:1]).any() for part in episode):
        raise UserError(
            "regulariser: needs tasks whose rows have the same labels, as few-shot tasks of this package have"
        )
