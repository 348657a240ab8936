"""The multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from mlframework.base_layers.base_layer import BaseLayer, Stack
from mlframework.base_layers.normalisation import norm_of
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue

__all__ = ["MLP", "check_hidden"]


class MLP(BaseLayer):
    """Fully connected layers on flattened inputs; the last linear layer is the head.

    Args:
        spec: the task's shapes.
        hidden: width of each hidden layer.
        norm: `batch` (statistics of the batch), `group` or `none`, before each ReLU.

    >>> import torch
    >>> MLP(TaskSpec("regression", (1,), 1), hidden=[40, 40])(torch.zeros(5, 1)).shape
    torch.Size([5, 1])
    """

    def __init__(self, spec: TaskSpec, *, hidden: Sequence[int] = (40, 40), norm: str = "none") -> None:
        check_hidden(hidden)
        widths = [math.prod(spec.x_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), norm_of(norm, outputs), nn.ReLU()]
        super().__init__(Stack(*layers), nn.Linear(widths[-1], spec.out_features))


def check_hidden(hidden: Sequence[int]) -> None:
    if not hidden or min(hidden) < 1:
        raise InvalidValue("hidden", list(hidden), "must name at least one layer, each at least 1 wide")
