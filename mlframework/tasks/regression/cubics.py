"""Cubic polynomials."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.tasks.regression.functions import Functions, uniform

__all__ = ["Cubics"]


class Cubics(Functions):
    """Polynomials of degree 3 in `x / 5`, whose four coefficients are U[-3, 3]; x U[-5, 5].

    Args:
        k_shot, k_query, outputs: see `Functions`.
    """

    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        coefficients = uniform(-3.0, 3.0, (num_tasks, 4, self.spec.out_features), generator)
        powers = torch.arange(4, dtype=torch.float64)
        return lambda x: (x / self.high) ** powers @ coefficients
