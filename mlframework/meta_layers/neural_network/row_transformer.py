"""A transformer over the examples of a task: support examples see each other, queries see the support set alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import at_least

__all__ = ["Context", "RowTransformer"]


class Context(NamedTuple):
    """The support set as queries see it: keys and values of each block."""

    keys: tuple[Tensor, ...]  # each [tasks, heads, n, width / heads]
    values: tuple[Tensor, ...]  # likewise
    mask: Tensor | None  # [tasks, n], 1 where an example counts; None: all count


class RowTransformer(nn.Module):
    """Reads a set of examples with targets, and answers queries one by one.

    An example is one token: its features and, in the support set, its target. Tokens have no positions, so the order
    of the support set does not matter, and it may have any size.

    Args:
        inputs, targets, outputs: numbers in the features of an example, in its target, and in an answer.
        width: of the tokens.
        depth: blocks.
        heads: attention heads of a block; they share its width.

    Reference: Mueller et al. 2022, arXiv:2112.10510, section 3 and figure 2b. Deviations: the norm comes first in each
        block; a query does not attend to itself, for its own token is in the residual stream.
    """

    def __init__(self, inputs: int, targets: int, outputs: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        for field, value in {"width": width, "depth": depth, "heads": heads}.items():
            at_least(field, value, 1)
        if width % heads:
            raise InvalidValue("heads", heads, f"must divide width={width} into equal parts")
        self.input, self.target = nn.Linear(inputs, width), nn.Linear(targets, width)
        self.blocks = nn.ModuleList(RowBlock(width, heads, depth) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(width))
        nn.init.zeros_(self.head.bias)

    def read(self, features: Tensor, targets: Tensor, mask: Tensor | None) -> Context:
        """Reads features `[tasks, n, inputs]` with targets `[tasks, n, targets]`; mask `[tasks, n]`."""
        rows, keys, values = self.input(features) + self.target(targets), [], []
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, RowBlock)
            key, value = block.remember(rows)
            keys.append(key)
            values.append(value)
            if number < len(self.blocks):  # queries read keys and values alone
                rows = block(rows, key, value, mask)
        return Context(tuple(keys), tuple(values), mask)

    def answer(self, context: Context, features: Tensor) -> Tensor:
        """Answers `[tasks, n, outputs]` for features `[tasks, n, inputs]`."""
        rows = self.input(features)
        for block, key, value in zip(self.blocks, context.keys, context.values, strict=True):
            rows = block(rows, key, value, context.mask)
        return self.head(self.norm(rows))


class RowBlock(nn.Module):
    """Attention to the support set and a perceptron, each on the normalised residual stream."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for linear in (self.query, self.key, self.value, self.output, self.expand, self.contract):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
        for linear in (self.output, self.contract):  # the more blocks, the smaller each starts
            linear.weight.data /= math.sqrt(2 * depth)

    def remember(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the support set's tokens `[tasks, n, width]`."""
        seen = self.attention_norm(rows)
        return self.parted(self.key(seen)), self.parted(self.value(seen))

    def forward(self, rows: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens `[tasks, n, width]` after they have attended to the keys that count by `mask` `[tasks, m]`."""
        query = self.parted(self.query(self.attention_norm(rows)))
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        if mask is not None:
            scores = scores.masked_fill((mask == 0)[:, None, None], -torch.inf)
        rows = rows + self.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return rows + self.contract(F.gelu(self.expand(self.mlp_norm(rows))))

    def parted(self, x: Tensor) -> Tensor:
        """`[tasks, n, width]` to heads: `[tasks, heads, n, width / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
