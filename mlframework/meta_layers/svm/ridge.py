"""R2-D2: ridge regression on a task's support features."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.meta_layers.meta_layer import BatchNormPolicy
from mlframework.meta_layers.svm.kernel_machine import KernelMachine
from mlframework.meta_layers.svm.kernels import Kernel
from mlframework.solvers.ridge import kernel_ridge
from mlframework.solvers.solution import Solution
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Ridge"]


class Ridge(KernelMachine):
    """Regresses on values, or on one-hot classes: `min_f sum_i |f(x_i) - y_i|^2 + reg |f|^2`, in closed form.

    Args:
        base_layer, task, frozen, batch_norm: see `OnFeatures`.
        kernel: similarity of features; the paper's is linear with a constant of 1.
        reg: the regulariser, where its learning starts.
        scale: turns what was fitted to 0 and 1 into logits; values are predicted as they are, without it.
        learn: which of `reg` and `scale` are learned.

    Reference: Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2019,
        arXiv:1805.08136, section 3.2. Deviations: `reg` and `scale` are learned through their logarithms; the offset
        of all logits is left out, as cross-entropy does not see it; nothing is divided by the number of examples, as
        the authors' code does, so that `reg` has scikit-learn's scale.
    """

    kinds = ("classification", "regression")

    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        kernel: Kernel,
        reg: float = 1.0,
        scale: float = 10.0,
        learn: Collection[str] = ("reg", "scale"),
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "support",
    ) -> None:
        positive = {"reg": reg, "scale": scale}
        if task.spec.kind == "regression":
            positive.pop("scale")
            learn = [name for name in learn if name != "scale"]
        super().__init__(
            base_layer, task, kernel=kernel, positive=positive, learn=learn, frozen=frozen, batch_norm=batch_norm
        )

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return kernel_ridge(kernel, targets, reg=self.positive["reg"], mask=mask)
