"""LR-D2: logistic regression on a task's support features."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.meta_layers.meta_layer import BatchNormPolicy
from mlframework.meta_layers.svm.kernel_machine import KernelMachine
from mlframework.meta_layers.svm.kernels import Kernel
from mlframework.solvers.logistic import logistic
from mlframework.solvers.solution import Solution
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Logistic"]


class Logistic(KernelMachine):
    """Regularised logistic regression of all classes at once: `min_f sum_i cross_entropy(f(x_i), y_i) + reg/2 |f|^2`.

    Args:
        base_layer, task, frozen, batch_norm: see `OnFeatures`.
        kernel: similarity of features; the paper's is linear with a constant of 1.
        reg: the regulariser, where its learning starts; `1 / reg` is scikit-learn's `C`.
        scale: multiplies the logits, where its learning starts.
        learn: which of `reg` and `scale` are learned.

    Reference: Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2019,
        arXiv:1805.08136, section 3.3. Deviations: solved to the optimum and differentiated implicitly, where the paper
        unrolls a few steps of iteratively reweighted least squares; all classes at once, where it has two or one
        against the rest; `reg` and `scale` are learned through their logarithms.
    """

    kinds = ("classification",)

    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        kernel: Kernel,
        reg: float = 1.0,
        scale: float = 1.0,
        learn: Collection[str] = ("reg", "scale"),
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "support",
    ) -> None:
        positive = {"reg": reg, "scale": scale}
        super().__init__(
            base_layer, task, kernel=kernel, positive=positive, learn=learn, frozen=frozen, batch_norm=batch_norm
        )

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return logistic(kernel, targets, reg=self.positive["reg"], mask=mask)
