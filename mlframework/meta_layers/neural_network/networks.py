"""Parts of the family's networks: fully connected layers, means over sets, attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["attention", "cosines", "fully_connected", "pairs", "set_mean"]


def fully_connected(inputs: int, hidden: Sequence[int], outputs: int, *, zero: bool = False) -> nn.Sequential:
    """Linear layers with SiLUs between them: `[..., inputs]` to `[..., outputs]`.

    They start by He et al. 2015, arXiv:1502.01852, equation 10: under torch's smaller initial values hardly any
    difference between two tasks reaches the end of a network that reads a whole set. With `zero` the network starts as
    the constant 0, by its last layer.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *hidden, outputs]):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    if zero:
        nn.init.zeros_(linear.weight)
    return nn.Sequential(*layers[:-1])


def set_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean `[tasks, d]` of the members `[tasks, n, d]` that count, by `mask` `[tasks, n]`; 0 where none does."""
    weights = mask.to(values.dtype).unsqueeze(1)
    return (weights @ values).squeeze(1) / weights.sum(-1).clamp(min=1)


def pairs(queries: Tensor, members: Tensor) -> Tensor:
    """Every query `[tasks, n, a]` beside every member `[tasks, m, b]`: `[tasks, n, m, a + b]`."""
    n, m = queries.shape[1], members.shape[1]
    return torch.cat([queries.unsqueeze(2).expand(-1, -1, m, -1), members.unsqueeze(1).expand(-1, n, -1, -1)], dim=-1)


def cosines(queries: Tensor, members: Tensor) -> Tensor:
    """The cosine of every query `[tasks, n, d]` with every member `[tasks, m, d]`: `[tasks, n, m]`."""
    return F.normalize(queries, dim=-1) @ F.normalize(members, dim=-1).mT


def attention(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of scores `[tasks, queries, n]` over the rows that count by `mask` `[tasks, n]`."""
    return scores.masked_fill(mask.unsqueeze(1) == 0, -torch.inf).softmax(-1)
