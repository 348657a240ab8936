"""R2-D2: ridge regression on a task's support features."""

from __future__ import annotations

from torch import Tensor

from mlframework.meta_layers.svm.kernel_machine import RegularisedFit
from mlframework.solvers.ridge import kernel_ridge
from mlframework.solvers.support_vectors import Solution

__all__ = ["Ridge"]


class Ridge(RegularisedFit):
    """Regresses on values, or on one-hot classes: `min_f sum_i |f(x_i) - y_i|^2 + reg |f|^2`, in closed form.

    `reg` has scikit-learn's scale; `scale` turns what was fitted to 0 and 1 into logits. In a sequence, with as many
    examples as there are positions, that is a step from the prior towards the support set in closed form. See
    `RegularisedFit` for the arguments.

    Reference: Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2019,
        arXiv:1805.08136, section 3.2. Deviations: `reg` and `scale` are learned through their logarithms; the offset
        of all logits is left out, as cross-entropy does not see it; nothing is divided by the number of examples, as
        the authors' code does, so that `reg` has scikit-learn's scale.
    """

    kinds = ("classification", "regression", "sequence")

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return kernel_ridge(kernel, targets, reg=self.positive["reg"], mask=mask)
