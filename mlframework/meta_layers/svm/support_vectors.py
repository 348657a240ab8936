"""Support vector machines on a task's support features."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.svm.kernel_machine import KernelMachine
from mlframework.solvers.support_vectors import Solution, crammer_singer, one_vs_rest
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["CrammerSingerSVM", "OneVsRestSVM", "SupportVectorMachine"]


class SupportVectorMachine(KernelMachine):
    """What support vector machines share: three numbers.

    Args:
        c: how much one example may push, in inverse units of the kernel: with a diagonal far above `1 / c`, no example
            is at its bound.
        reg: added to the kernel's diagonal, as if each support example had a feature of its own: errors cost their
            square as well.
        scale: turns margins of about 1 into logits.
        learn: which of `c`, `reg` and `scale` are learned, from there on. Where no example is at its bound, `c` changes
            nothing, and its gradient is 0.
    """

    kinds = ("classification",)

    @with_settings_of(KernelMachine, but=["positive"])
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        c: float = 1.0,
        reg: float = 1.0,
        scale: float = 10.0,
        learn: Collection[str] = ("scale",),
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, positive={"c": c, "reg": reg, "scale": scale}, learn=learn, **settings)


class CrammerSingerSVM(SupportVectorMachine):
    """The multi-class support vector machine, whose classes compete for each example.

    Reference: Lee, Maji, Ravichandran, Soatto, Meta-Learning with Differentiable Convex Optimization (MetaOptNet),
        2019, arXiv:1904.03758, equations 5 to 8. Deviations: `c` is 1, where the paper has 0.1 and features whose
        kernel has a diagonal of thousands, so that it does not bind (here, with features near 1, 0.1 would); solved to
        the optimum, where the paper stops after 15 iterations of an interior point method (3 at test); `scale` is
        learned through its logarithm and starts at 10, which makes a margin of 1 a confident prediction.
    """

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return crammer_singer(kernel, targets, c=self.positive["c"], reg=self.positive["reg"], mask=mask)


class OneVsRestSVM(SupportVectorMachine):
    """A two-class support vector machine with hinge loss for each class against all others; the largest margin wins.

    Reference: Cortes, Vapnik, Support-vector networks, 1995, doi:10.1007/BF00994018, section 3; without an offset, and
        with a class against all others as in Rifkin, Klautau, In defense of one-vs-all classification, 2004.
    """

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return one_vs_rest(kernel, targets, c=self.positive["c"], reg=self.positive["reg"], mask=mask)
