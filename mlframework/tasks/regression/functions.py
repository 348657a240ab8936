"""The common base of regressions on one number: a random function for each task, seen at random places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.tasks.few_shot import check_at_least
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Functions", "uniform"]


class Functions(TaskDistribution):
    """Random functions of one number, at places uniform in a range; a subclass says which functions.

    The three splits are the same distribution, with other draws. All is computed in float64 and rounded at the end: the
    last bit of a sine differs between processors, and the hash of a task must not.

    Args:
        k_shot: support points per task.
        k_query: query points per task.
        outputs: numbers that a function returns.
    """

    #: The range of the inputs.
    low, high = -5.0, 5.0

    def __init__(self, k_shot: int, k_query: int, *, outputs: int = 1) -> None:
        check_at_least(1, k_shot=k_shot, k_query=k_query, outputs=outputs)
        self.k_shot, self.k_query = k_shot, k_query
        self.spec = TaskSpec("regression", x_shape=(1,), out_features=outputs, ragged=False)

    @abstractmethod
    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Draws a function for each task: from places `[tasks, n, 1]` to values `[tasks, n, outputs]`, in float64."""

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        function = self.draw(num_tasks, generator)
        x = uniform(self.low, self.high, (num_tasks, self.k_shot + self.k_query, 1), generator)
        examples = Examples(x.float(), function(x).float(), torch.ones(num_tasks, x.shape[1]))
        return Episode(examples.rows(slice(self.k_shot)), examples.rows(slice(self.k_shot, None)))


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform random numbers in float64."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
