"""LR-D2: logistic regression on a task's support features."""

from __future__ import annotations

from torch import Tensor

from mlframework.meta_layers.svm.kernel_machine import RegularisedFit
from mlframework.solvers.logistic import logistic
from mlframework.solvers.support_vectors import Solution

__all__ = ["Logistic"]


class Logistic(RegularisedFit):
    """Regularised logistic regression of all classes at once: `min_f sum_i cross_entropy(f(x_i), y_i) + reg/2 |f|^2`.

    `1 / reg` is scikit-learn's `C`. See `RegularisedFit` for the arguments.

    Reference: Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2019,
        arXiv:1805.08136, section 3.3. Deviations: solved to the optimum and differentiated implicitly, where the paper
        unrolls a few steps of iteratively reweighted least squares; all classes at once, where it has two or one
        against the rest; `reg` and `scale` are learned through their logarithms.
    """

    kinds = ("classification",)

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return logistic(kernel, targets, reg=self.positive["reg"], mask=mask)
