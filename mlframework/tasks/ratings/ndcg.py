"""Normalised discounted cumulative gain: how well predictions order what a user rated."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ndcg"]


def ndcg(scores: Tensor, gains: Tensor, mask: Tensor, k: int) -> Tensor:
    """nDCG@k of each task `[tasks]`: the DCG of the order by score, divided by that of the best order.

    `DCG@k = sum_{r <= k} gain_r / log2(r + 1)` over the ranks `r` from 1. Examples of equal score share the places that
    they take, with equal probability, so that no order among them is an advantage. With fewer than `k` examples, all
    of them count. Where no order has a gain, any order is perfect: 1.

    Args:
        scores: predictions `[tasks, n]`; higher ones stand first.
        gains: of each example, at least 0, `[tasks, n]`; `2^rating - 1` as a rule.
        mask: `[tasks, n]`, 1 counts, 0 does not.
        k: how many places count.

    Reference: Järvelin, Kekäläinen, Cumulated gain-based evaluation of IR techniques, 2002, doi:10.1145/582415.582418;
        gains of Burges et al. 2005, doi:10.1145/1102351.1102363; ties as in McSherry, Najork 2008,
        doi:10.1007/978-3-540-78646-7_38, section 2.

    >>> one = torch.ones(1, 3)
    >>> ndcg(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.0]]), one, 2)  # nothing to gain
    tensor([1.])
    >>> ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 7.0, 0.0]]), one, 1)  # the best one is second
    tensor([0.])
    """
    counts = mask > 0
    gains = gains.masked_fill(~counts, 0)
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=gains.dtype)
    discounts = torch.where(ranks <= k, 1 / torch.log2(ranks + 1), 0)
    up_to = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])  # of the first 0, 1, ..., n places
    others = counts.unsqueeze(1)
    above = ((scores.unsqueeze(1) > scores.unsqueeze(2)) & others).sum(-1)  # [tasks, n]
    equal = ((scores.unsqueeze(1) == scores.unsqueeze(2)) & others).sum(-1).clamp(min=1)
    last = (above + equal).clamp(max=scores.shape[1])
    found = (gains * (up_to[last] - up_to[above]) / equal).sum(1)
    best = gains.sort(1, descending=True).values @ discounts
    return torch.where(best > 0, found / best.where(best > 0, 1), 1)
