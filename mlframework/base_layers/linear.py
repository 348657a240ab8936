"""The simplest base layer: the inputs themselves, then a linear head."""

from __future__ import annotations

import math

from torch import nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import TaskSpec

__all__ = ["LinearModel"]


class LinearModel(BaseLayer):
    """A linear model of the flattened inputs, which are its features.

    >>> import torch
    >>> LinearModel(TaskSpec("classification", (4,), 3))(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(nn.Flatten(), nn.Linear(math.prod(spec.x_shape), spec.out_features))
