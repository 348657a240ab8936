"""What the contenders of outer_step.py share: a step, its optimizer, its rates and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.tasks import TaskDistribution

__all__ = ["INNER_LR", "OUTER_LR", "Step", "adam", "gradients", "task_loss"]

INNER_LR, OUTER_LR = 0.01, 1e-3

#: Takes an outer step, and returns the meta-gradient it took, in the order of the base layer's parameters; what is on a
#: GPU may yet have to be computed.
Step = Callable[[], list[Any]]


def adam(module: nn.Module) -> torch.optim.Adam:
    """The optimizer of all that are written in torch."""
    return torch.optim.Adam(module.parameters(), lr=OUTER_LR, fused=True)


def gradients(learned: Iterable[Tensor]) -> list[Tensor]:
    """What an outer step left in `.grad`; to go through a module for its parameters may take as long as a step."""
    return [p.grad for p in learned if p.grad is not None]


def task_loss(task: TaskDistribution) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of one task, of predictions `[n, ..., out_features]` and targets."""
    if task.spec.kind == "regression":
        return F.mse_loss
    return lambda prediction, y: F.cross_entropy(prediction.reshape(y.numel(), -1), y.flatten())
