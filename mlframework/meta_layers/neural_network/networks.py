"""What the family's networks are made of: fully connected layers, and means over sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mlframework.errors import InvalidValue

__all__ = ["check_hidden", "fully_connected", "set_mean"]


def fully_connected(inputs: int, hidden: Sequence[int], outputs: int, *, zero: bool = False) -> nn.Sequential:
    """Linear layers with ReLUs between them: `[..., inputs]` to `[..., outputs]`.

    Args:
        inputs, outputs: sizes at either end.
        hidden: width of each layer between.
        zero: whether the network starts as the constant 0, by its last layer.
    """
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    if zero:
        for parameter in network[-1].parameters():
            nn.init.zeros_(parameter)
    return network


def check_hidden(hidden: Sequence[int]) -> None:
    """Refuses widths of hidden layers that make no network."""
    if not hidden or min(hidden) < 1:
        raise InvalidValue("hidden", list(hidden), "must name at least one layer, each at least 1 wide")


def set_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean `[tasks, d]` of the members `[tasks, n, d]` that count, by `mask` `[tasks, n]`; 0 where none does."""
    weights = mask.to(values.dtype).unsqueeze(1)
    return (weights @ values).squeeze(1) / weights.sum(-1).clamp(min=1)
