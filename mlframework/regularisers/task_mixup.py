"""Task mixup: new tasks between pairs of tasks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import UserError
from mlframework.inner_loop.inner_update import positive
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.meta_layers.regulariser import Regulariser
from mlframework.regularisers.label_permutation import same_labels
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["TaskMixup"]


class TaskMixup(Regulariser):
    """Replaces each task by a mixture with a random task of the meta-batch, row by row.

    Inputs are `share * own + (1 - share) * other`, with one share per task. Targets of a regression mix alike. In a
    classification the rows of one class mix with those of the class of the same number, and make a new class.

    Args:
        alpha: shares are Beta(alpha, alpha); small: near 0 or 1, so that tasks hardly mix.

    Reference: Yao, Zhang, Finn, Meta-Learning with Fewer Tasks through Task Interpolation (MLTI), 2022,
        arXiv:2106.02695. Deviation: inputs mix, not the features of a random layer.
    """

    kinds = ("regression", "classification")

    def __init__(self, *, alpha: float) -> None:
        super().__init__()
        self.alpha = positive("alpha", alpha)

    def check(self, task: TaskDistribution) -> None:
        super().check(task)
        if not task.sample(1, "train", torch.Generator().manual_seed(0)).support.x.is_floating_point():
            raise UserError(f"mixes numbers, and the inputs of {type(task).__name__} are tokens")

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        if meta_layer.task.spec.kind == "classification":
            same_labels(episode)
        other = torch.randperm(episode.num_tasks, generator=generator)
        # torch's Beta draws from its global generator alone.
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        share = torch.from_numpy(rng.beta(self.alpha, self.alpha, episode.num_tasks))
        return Episode(*(mixed(part, other, share) for part in episode))


def mixed(examples: Examples, other: Tensor, share: Tensor) -> Examples:
    """Each task mixed with the task `other[task]`; rows that this one does not have stay as they are."""
    x, y, mask = examples
    share = torch.where(mask[other] > 0, share[:, None].to(x.dtype), 1.0)  # [tasks, n]

    def between(values: Tensor) -> Tensor:
        weight = share.view(*share.shape, *(1 for _ in values.shape[2:]))
        return weight * values + (1 - weight) * values[other]

    return Examples(between(x), between(y) if y.is_floating_point() else y, mask)
