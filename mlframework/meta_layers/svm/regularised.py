"""R2-D2 and LR-D2: ridge and logistic regression on a task's support features."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.svm.kernel_machine import Fitted, KernelMachine, of_finite
from mlframework.solvers.logistic import logistic
from mlframework.solvers.ridge import kernel_ridge, linear_ridge
from mlframework.solvers.support_vectors import Solution
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Logistic", "RegularisedFit", "Ridge"]


class RegularisedFit(KernelMachine):
    """A loss on the support set plus a multiple of the model's squared norm; the papers' kernel is `<a, b> + 1`.

    Args:
        reg: the regulariser, where its learning starts.
        scale: multiplies the outputs, where its learning starts; a regression, which predicts values as they are, has
            none.
        learn: which of `reg` and `scale` are learned.
    """

    @with_settings_of(KernelMachine, but=["positive"])
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        reg: float = 1.0,
        scale: float = 1.0,
        learn: Collection[str] = ("reg", "scale"),
        **settings: Any,
    ) -> None:
        positive = {"reg": reg, "scale": scale}
        if task.spec.kind == "regression":
            del positive["scale"]
            learn = [name for name in learn if name != "scale"]
        super().__init__(base_layer, task, positive=positive, learn=learn, **settings)


class Ridge(RegularisedFit):
    """Regresses on values, or on one-hot classes: `min_f sum_i |f(x_i) - y_i|^2 + reg |f|^2`, in closed form.

    Where the kernel has features, as the linear one, and fewer of them than there are support examples, the system that
    is solved has a row for each feature, not for each example.

    `reg` has scikit-learn's scale; `scale` turns what was fitted to 0 and 1 into logits. In a sequence, with as many
    examples as there are positions, that is a step from the prior towards the support set in closed form. See
    `RegularisedFit` for the arguments.

    Reference: Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2019,
        arXiv:1805.08136, section 3.2. Deviations: `reg` and `scale` are learned through their logarithms; the offset
        of all logits is left out, as cross-entropy does not see it; nothing is divided by the number of examples, as
        the authors' code does, so that `reg` has scikit-learn's scale.
    """

    def solution(self, features: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        known = self.kernel.features(features)
        if known is None or known.shape[2] >= known.shape[1]:
            return super().solution(features, targets, mask)
        return of_finite(known, lambda known: linear_ridge(known, targets, reg=self.positive["reg"], mask=mask))

    def multiplied(self, adapted: Fitted, features: Tensor) -> Tensor:
        """Similarities to the support examples, or the features whose weights were solved for `[tasks, m, p]`."""
        known = self.kernel.features(features)
        solved_by_features = adapted.solution.dual.shape[1] < adapted.features.shape[1]
        return known if known is not None and solved_by_features else super().multiplied(adapted, features)

    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        return kernel_ridge(kernel, targets, reg=self.positive["reg"], mask=mask)


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
