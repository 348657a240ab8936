"""Damped oscillators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.tasks.regression.functions import Functions, uniform

__all__ = ["DampedOscillator"]


class DampedOscillator(Functions):
    """Oscillations that die away: `amplitude * exp(-decay * x) * cos(frequency * x + phase)` at times x U[0, 10].

    Amplitude U[1, 5], decay U[0.05, 0.5], frequency U[0.5, 3], phase U[0, 2 pi], for each output.

    Args:
        k_shot, k_query, outputs: see `Functions`.
    """

    low, high = 0.0, 10.0

    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        ranges = ((1.0, 5.0), (0.05, 0.5), (0.5, 3.0), (0.0, 2 * math.pi))
        shape = num_tasks, 1, self.spec.out_features
        amplitude, decay, frequency, phase = (uniform(*each, shape, generator) for each in ranges)
        return lambda x: amplitude * torch.exp(-decay * x) * torch.cos(frequency * x + phase)
