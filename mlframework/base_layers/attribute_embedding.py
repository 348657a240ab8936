"""Embeddings of attributes, and a multi-layer perceptron on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer, Stack
from mlframework.base_layers.mlp import check_hidden
from mlframework.base_layers.normalisation import norm_of
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue

__all__ = ["AttributeEmbedding"]


class AttributeEmbedding(BaseLayer):
    """Embeds each block of the input by a matrix of its own; fully connected layers follow, the last is the head.

    A one-hot block picks a row of its matrix, shares of several categories the mean of their rows, and a number a
    multiple of one row. The embeddings stand beside each other. MeLU adapts all but the embeddings:
    `algorithm.adapts='^features\\.[1-9]|^head'`.

    Args:
        spec: the task's shapes; `spec.blocks` are the widths of the blocks. Without them the input is one block.
        width: of each embedding.
        hidden: width of each hidden layer.
        norm: `batch` (statistics of the batch), `group` or `none`, before each ReLU.

    Reference: Lee et al., MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation, 2019,
        arXiv:1908.00413, section 3. Deviation: numbers are embedded as they are, where MeLU has categories alone.

    >>> spec = TaskSpec("regression", (6,), 1, blocks=(1, 5))
    >>> AttributeEmbedding(spec, width=4, hidden=[8])(torch.zeros(3, 6)).shape
    torch.Size([3, 1])
    """

    def __init__(
        self, spec: TaskSpec, *, width: int = 16, hidden: Sequence[int] = (64, 64), norm: str = "none"
    ) -> None:
        check_hidden(hidden)
        if width < 1:
            raise InvalidValue("width", width, "must be at least 1")
        blocks = spec.blocks or (math.prod(spec.x_shape),)
        layers: list[nn.Module] = [Embeddings(blocks, width)]
        for inputs, outputs in pairwise([width * len(blocks), *hidden]):
            layers += [nn.Linear(inputs, outputs), norm_of(norm, outputs), nn.ReLU()]
        super().__init__(Stack(*layers), nn.Linear(hidden[-1], spec.out_features))


class Embeddings(nn.Module):
    """A matrix for each block: inputs `[n, sum of blocks]` to `[n, width * blocks]`."""

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.sizes = tuple(blocks)
        matrices = [nn.Linear(size, width, bias=False) for size in blocks]
        for matrix in matrices:
            # A block has one category, or shares of some: its rows are as large as those of a single input.
            nn.init.uniform_(matrix.weight, -1, 1)
        self.blocks = nn.ModuleList(matrices)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.flatten(1).split(self.sizes, dim=-1)
        return torch.cat([block(part) for block, part in zip(self.blocks, parts, strict=True)], dim=-1)
