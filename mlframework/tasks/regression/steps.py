"""Step functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.tasks.few_shot import check_at_least
from mlframework.tasks.regression.functions import Functions, uniform

__all__ = ["Steps"]


class Steps(Functions):
    """Functions that are constant between jumps: levels U[-3, 3], places of the jumps U[-5, 5], x U[-5, 5].

    Args:
        k_shot, k_query, outputs: see `Functions`.
        jumps: of each output.
    """

    def __init__(self, k_shot: int, k_query: int, *, outputs: int = 1, jumps: int = 2) -> None:
        super().__init__(k_shot, k_query, outputs=outputs)
        check_at_least(1, jumps=jumps)
        self.jumps = jumps

    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        outputs = self.spec.out_features
        jumps = uniform(self.low, self.high, (num_tasks, 1, outputs, self.jumps), generator)
        levels = uniform(-3.0, 3.0, (num_tasks, self.jumps + 1, outputs), generator)
        return lambda x: levels.gather(1, (x[..., None] > jumps).sum(-1))
