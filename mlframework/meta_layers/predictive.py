"""Predictive distributions: normal ones of values, or the probabilities of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Predictive", "normal_nll"]


class Predictive(NamedTuple):
    """The predictive distribution of every query: of values a normal one, of classes the softmax of the logits."""

    prediction: Tensor  # expected values, or logits of classes, [tasks, n, out_features]
    variance: Tensor | None = None  # of each value, with its noise, [tasks, n, out_features]; None: not stated

    def rows(self, rows: slice) -> Predictive:
        """That of a slice of the queries."""
        return Predictive(self.prediction[:, rows], None if self.variance is None else self.variance[:, rows])

    @classmethod
    def joined(cls, parts: Sequence[Predictive], *, dim: int = 1) -> Predictive:
        """That of several parts, one after the other along the axis of queries, or of tasks (0)."""
        variances = [part.variance for part in parts if part.variance is not None]
        predictions = torch.cat([part.prediction for part in parts], dim=dim)
        return cls(predictions, torch.cat(variances, dim=dim) if variances else None)


def normal_nll(prediction: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Minus the logarithm of a normal density, in nats, `[...]`: the mean over the outputs of `[..., out_features]`.

    >>> normal_nll(torch.zeros(1), torch.ones(1), torch.ones(1))
    tensor(1.4189)
    """
    return 0.5 * ((y - prediction).square() / variance + variance.log() + math.log(2 * math.pi)).mean(-1)
