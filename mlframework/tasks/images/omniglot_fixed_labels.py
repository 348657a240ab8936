"""Omniglot whose training characters keep their labels, so that they can be learned by heart."""

from __future__ import annotations

import torch
from torch import Tensor

from mlframework.episode import Split
from mlframework.tasks.few_shot import distinct
from mlframework.tasks.images.omniglot import Omniglot

__all__ = ["OmniglotFixedLabels"]


class OmniglotFixedLabels(Omniglot):
    """Omniglot with tasks that are not mutually exclusive: each training class has one label, in all tasks.

    The training classes form `n_way` groups, and a task draws one class of each. One network without a support set can
    then solve all training tasks. Validation and test tasks are those of `Omniglot`.

    Args:
        n_way, k_shot, k_query, splits, train_classes, rotations, image_size, data_dir, download: see `Omniglot`.

    Reference: Yin, Tucker, Zhou, Levine, Finn, Meta-Learning without Memorization, 2020, arXiv:1912.03820, section 6.3
        (non-mutually-exclusive Omniglot).
    """

    def drawn_classes(self, num_tasks: int, split: Split, generator: torch.Generator) -> Tensor:
        if split != "train":
            return super().drawn_classes(num_tasks, split, generator)
        labels = torch.arange(self.n_way)
        sizes = (len(self.classes(split).sizes) - labels - 1) // self.n_way + 1  # of each group
        within = distinct(sizes.expand(num_tasks, -1), 1, generator).squeeze(-1)
        return within * self.n_way + labels
