"""Sinusoid regression, the toy problem of the MAML paper."""

from __future__ import annotations

import math

import torch

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidValue
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Sinusoid"]


class Sinusoid(TaskDistribution):
    """Waves `y = amplitude * sin(x - phase)` with amplitude U[0.1, 5], phase U[0, pi] and x U[-5, 5].

    The three splits are the same distribution, with other draws.

    Args:
        k_shot: support points per task.
        k_query: query points per task.

    Reference: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
        arXiv:1703.03400; section 5.1.

    >>> episode = Sinusoid(k_shot=5, k_query=10).sample(2, "train", torch.Generator().manual_seed(0))
    >>> episode.support.x.shape
    torch.Size([2, 5, 1])
    """

    def __init__(self, k_shot: int = 10, k_query: int = 10) -> None:
        for field, value in {"k_shot": k_shot, "k_query": k_query}.items():
            if value < 1:
                raise InvalidValue(field, value, "must be at least 1")
        self.k_shot, self.k_query = k_shot, k_query
        self.spec = TaskSpec("regression", x_shape=(1,), out_features=1, ragged=False)

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        # In float64 and rounded at the end: sin() differs in its last bit between processors, the hash must not.
        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

        amplitude = uniform(0.1, 5.0, num_tasks, 1, 1)
        phase = uniform(0.0, math.pi, num_tasks, 1, 1)
        x = uniform(-5.0, 5.0, num_tasks, self.k_shot + self.k_query, 1)
        y = amplitude * torch.sin(x - phase)
        examples = Examples(x.float(), y.float(), torch.ones(num_tasks, x.shape[1]))
        return Episode(examples.rows(slice(self.k_shot)), examples.rows(slice(self.k_shot, None)))
