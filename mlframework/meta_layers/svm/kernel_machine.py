"""The base of the Meta-SVMs: a task's model is the optimum of a convex problem on its support features."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlframework.backend.forward import is_fake
from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import Metrics, with_settings_of
from mlframework.meta_layers.svm.kernels import Kernel, Positive
from mlframework.solvers.support_vectors import Solution
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Fitted", "KernelMachine", "of_finite"]

log = logging.getLogger(__name__)


class Fitted(NamedTuple):
    """Each task's model, and how its solver fared; features and duals are 0 in rows that do not count."""

    features: Tensor  # of the support set, [tasks, n, d]
    solution: Solution  # dual [tasks, n, out_features], or of each feature's weights; residual and converged [tasks]


class KernelMachine(FeatureMetaLayer):
    """Predicts `sum_i dual_i k(x_i, x)` over the support examples `x_i`; the duals solve a convex problem.

    A subclass implements `solve`. The base layer is the embedding network. The meta layer is the convex problem,
    whose kernel and few numbers may be learned too. The meta-gradient goes through the optimum by the implicit function
    theorem.

    In a sequence the model is fitted to the prior's errors: the targets are one-hot tokens minus the prior's
    probabilities, and the prediction is added to the prior's logits.

    Every step reports `solver_residual`, `solver_converged` (1 or 0, so the mean is the share of tasks) and the learned
    numbers beside the base layer. A task that did not converge is used as it is; the first time, a warning says so.

    Args:
        kernel: similarity of features.
        positive: the problem's numbers by name, each above 0; `scale`, if there is one, multiplies the outputs.
        learn: names of the numbers that the outer loop learns.
    """

    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        kernel: Kernel,
        positive: Mapping[str, float],
        learn: Collection[str],
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, **settings)
        self.kernel = kernel
        self.positive = Positive(positive, learn=learn)
        self.warned = False

    @abstractmethod
    def solve(self, kernel: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        """The optimum of every task, by the support set's kernel with itself `[tasks, n, n]`.

        Targets are values or one-hot classes `[tasks, n, out_features]`; `mask` `[tasks, n]`: which count (None: all).
        """

    def fit(self, features: Tensor, support: Examples) -> Fitted:
        padding = support.mask.unsqueeze(-1) == 0
        features = features.masked_fill(padding, 0)
        targets = self.targets(support)
        if self.prior is not None:
            targets = targets - self.prior(features).softmax(-1).masked_fill(padding, 0)
        solution = self.solution(features, targets, self.mask_or_none(support.mask))
        self.warn_of(solution)
        return Fitted(features, solution)

    def solution(self, features: Tensor, targets: Tensor, mask: Tensor | None) -> Solution:
        """The optimum of every task for support features `[tasks, n, d]`; for targets and mask see `solve`."""
        return of_finite(self.kernel(features, features), lambda kernel: self.solve(kernel, targets, mask))

    def outputs(self, adapted: Fitted, features: Tensor) -> Tensor:
        found = self.multiplied(adapted, features) @ adapted.solution.dual
        found = self.positive["scale"] * found if "scale" in self.positive.logarithms else found
        return found if self.prior is None else self.prior(features) + found

    def multiplied(self, adapted: Fitted, features: Tensor) -> Tensor:
        """What the duals multiply: similarities `[tasks, m, n]` of features `[tasks, m, d]` to the support examples."""
        return self.kernel(features, adapted.features)

    def diagnostics(self, adapted: Fitted) -> Metrics:
        residual = adapted.solution.residual.detach()
        metrics = {"solver_residual": residual, "solver_converged": adapted.solution.converged.to(residual.dtype)}
        learned = {**self.positive.learned(), **self.kernel.learned()}
        return metrics | {name: value.expand(len(residual)) for name, value in learned.items()}

    def warn_of(self, solution: Solution) -> None:
        """One line for the first tasks that did not converge; TensorBoard has the others, and a graph's."""
        if self.warned or is_fake(solution.converged) or bool(solution.converged.all()):
            return
        self.warned = True
        failed, tasks = int((~solution.converged).sum()), len(solution.converged)
        text = "%s: the solver did not converge in %d of %d tasks (largest residual %.1e); "
        text += "from here on, see solver_converged and solver_residual"
        log.warning(text, type(self).__name__, failed, tasks, float(solution.residual.max()))


def of_finite(numbers: Tensor, solve: Callable[[Tensor], Solution]) -> Solution:
    """The solution for each task's numbers `[tasks, n, m]`; coefficients are nan where a number is not finite.

    A solver may refuse such numbers, and all tasks with them. So only the broken task's loss is nan.
    """
    broken = ~numbers.isfinite().flatten(1).all(1)
    found = solve(numbers.masked_fill(broken[:, None, None], 0))
    dual = found.dual.masked_fill(broken[:, None, None], torch.nan)
    return Solution(dual, found.residual.masked_fill(broken, torch.inf), found.converged & ~broken)
