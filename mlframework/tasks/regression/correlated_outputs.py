"""Several outputs per input that go together: mixtures of draws of a Gaussian process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlframework.tasks.few_shot import check_at_least
from mlframework.tasks.regression.functions import Functions
from mlframework.tasks.regression.gaussian_process import GaussianProcess

__all__ = ["CorrelatedOutputs"]


class CorrelatedOutputs(Functions):
    """`outputs` curves, each a random mixture of the same `latent` draws of a Gaussian process with an RBF kernel.

    Weights are standard normal over the root of `latent`, and drawn anew for each task: from a few points a learner can
    find how the outputs of this task go together.

    Args:
        k_shot, k_query, outputs: see `Functions`.
        latent: draws that are mixed.
        length: their length scale.

    Reference: Bonilla, Chai, Williams, Multi-task Gaussian Process Prediction, 2008 (intrinsic coregionalisation).
    """

    def __init__(self, k_shot: int, k_query: int, *, outputs: int = 3, latent: int = 2, length: float = 1.0) -> None:
        super().__init__(k_shot, k_query, outputs=outputs)
        check_at_least(1, latent=latent)
        self.latent, self.process = latent, GaussianProcess(k_shot, k_query, length=length)

    def draw(self, num_tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        shape = num_tasks, self.latent, self.spec.out_features
        weights = torch.randn(shape, generator=generator, dtype=torch.float64) / self.latent**0.5
        return lambda x: self.process.values(x, self.latent, generator) @ weights
