"""Sinusoid regression, the toy problem of the MAML paper."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.tasks.regression.functions import Functions, uniform

__all__ = ["Sinusoid"]


class Sinusoid(Functions):
    """Waves `y = amplitude * sin(x - phase)` with amplitude U[0.1, 5], phase U[0, pi] and x U[-5, 5].

    Args:
        k_shot, k_query: see `Functions`.

    Reference: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
        arXiv:1703.03400; section 5.1.

    >>> episode = Sinusoid(k_shot=5, k_query=10).sample(2, "train", torch.Generator().manual_seed(0))
    >>> episode.support.x.shape
    torch.Size([2, 5, 1])
    """

    def __init__(self, k_shot: int = 10, k_query: int = 10) -> None:
        super().__init__(k_shot, k_query)

    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        amplitude = uniform(0.1, 5.0, (num_tasks, 1, 1), generator)
        phase = uniform(0.0, math.pi, (num_tasks, 1, 1), generator)
        return lambda x: amplitude * torch.sin(x - phase)
