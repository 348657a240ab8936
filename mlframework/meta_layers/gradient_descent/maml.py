"""Meta-Gradient-Descent: a functional inner loop of gradient steps on the support loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mlframework.backend import shared_start, stacked
from mlframework.backend.forward import COMPILER
from mlframework.backend.operators import is_traced
from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Episode, Examples, Params, masked_mean
from mlframework.errors import InvalidValue
from mlframework.inner_loop import InnerUpdate
from mlframework.inner_loop.inner_loop import inner_loop, last
from mlframework.meta_layers.gradient_descent.meta_gradients import MetaGradient
from mlframework.meta_layers.gradient_descent.norm_weights import NormWeights, SharedNorm
from mlframework.meta_layers.gradient_descent.step_weights import LastStep, StepWeights
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics, matching
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["MAML"]

log = logging.getLogger(__name__)

#: What decides the first gradient; who changes it gets that of stacks.
FIRST_STEP = ("initial", "predict", "call_base_layer")


class MAML(MetaLayer):
    """Learns an initialisation from which a few gradient steps on the support loss fit a task.

    Three separate choices make its relatives: what is adapted (`adapts`), the update rule (`update`) and the way to the
    meta-gradient (`meta_gradient`). MAML adapts everything by SGD, exactly; FOMAML is first order; ANIL adapts the head
    alone and BOIL everything else; Meta-SGD learns the rates; Reptile takes the difference of parameters.

    Args:
        base_layer: inputs to features to predictions.
        task: says what the loss and the metrics are.
        update: builds the update rule from the adapted parameters, as in `functools.partial(SGD, lr=0.01)`.
        meta_gradient: `Exact()`, `FirstOrder()` or `ParameterDifference()`.
        step_weights: how much the query loss after each inner step counts; None: only the last one.
        norm: builds, from the base layer, the weights of its batch norms at each inner step; None: always its own.
        inner_steps: inner steps while meta-training.
        test_inner_steps: inner steps in evaluation mode; None takes `inner_steps`.
        inner_weight_decay: share of each adapted parameter that is added to its inner gradient.
        inner_clip: the largest norm of a task's inner gradient; None leaves it as it is.
        adapts: a regular expression for the parameters that adapt; the others are learned by the outer loop alone.
        frozen, batch_norm: see `MetaLayer`.
        checkpoint_steps: keep only each inner step's parameters and compute the rest anew in the backward pass.

    Reference: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
        arXiv:1703.03400, algorithm 1. ANIL: Raghu et al. 2020, arXiv:1909.09157. BOIL: Oh et al. 2021,
        arXiv:2008.08882.
    """

    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        update: Callable[[Params], InnerUpdate],
        meta_gradient: MetaGradient,
        step_weights: StepWeights | None = None,
        norm: Callable[[BaseLayer], NormWeights] | None = None,
        inner_steps: int,
        test_inner_steps: int | None = None,
        inner_weight_decay: float = 0.0,
        inner_clip: float | None = None,
        adapts: str = ".",
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "transductive",
        checkpoint_steps: bool = False,
    ) -> None:
        super().__init__(base_layer, task, frozen=frozen, batch_norm=batch_norm)
        for field, value in {"inner_steps": inner_steps, "test_inner_steps": test_inner_steps}.items():
            if value is not None and value < 1:
                raise InvalidValue(field, value, "must be at least 1")
        self.norm = (norm or SharedNorm)(base_layer)
        learned = {name: p for name, p in base_layer.named_parameters() if p.requires_grad}
        firsts = {id(p): name for name, p in learned.items()}
        every = {name: p for name, p in base_layer.named_parameters(remove_duplicate=False) if p.requires_grad}
        found = {firsts[id(every[name])] for name in matching(adapts, every, field="adapts")}
        self.adapted_names = [name for name in learned if name in found]
        self.update = update({name: learned[name].detach() for name in self.adapted_names})
        self.meta_gradient = meta_gradient
        self.step_weights = step_weights or LastStep()
        if not (meta_gradient.uses_query_losses or isinstance(self.step_weights, LastStep)):
            why = f"weighs query losses, and {type(meta_gradient).__name__} takes none: use last"
            raise InvalidValue("step_weights", type(self.step_weights).__name__, why)
        self.inner_steps = inner_steps
        self.test_inner_steps = test_inner_steps or inner_steps
        if inner_weight_decay < 0:
            raise InvalidValue("inner_weight_decay", inner_weight_decay, "must be at least 0")
        if inner_clip is not None and not inner_clip > 0:
            raise InvalidValue("inner_clip", inner_clip, "must be above 0, or null for no clipping")
        self.inner_weight_decay, self.inner_clip = inner_weight_decay, inner_clip
        self.checkpoint_steps = checkpoint_steps
        self.idle: set[str] = set()
        unchanged = all(getattr(type(self), name) is getattr(MAML, name) for name in FIRST_STEP)
        plain = unchanged and isinstance(self.norm, SharedNorm) and not self.is_tied
        self.shares = plain and shared_start.suits(base_layer, self.adapted_names)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        only_last = not any(self.weights_of_steps()[:-1])
        return only_last and self.meta_gradient.exact(self.inner_steps, self.outer_step)

    @property
    def trained_inner_steps(self) -> int:
        return self.meta_gradient.trained_steps(self.inner_steps)

    def adapt(self, support: Examples) -> Params:
        return last(self.trajectory(support, self.inner_steps if self.training else self.test_inner_steps))

    def predict(self, adapted: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.call_base_layer(adapted, x, mask)

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Metrics]:
        return self.meta_gradient.meta_loss(self, episode)

    def weights_of_steps(self) -> list[float]:
        """How much the query loss after 1, 2, ..., `inner_steps` steps counts at this outer step."""
        return self.step_weights(self.inner_steps, self.outer_step)

    def initial(self, support: Examples) -> Params:
        """Where each task's adapted parameters start: the initialisation, stacked as often as there are tasks (a view).

        It is handed the support set for those who let it depend on that.
        """
        return stacked.expanded(self.base_layer, self.adapted_names, len(support.mask))

    def trajectory(self, support: Examples, steps: int, *, batch_size: int | None = None) -> Iterator[Params]:
        """The stacked parameters after 0, 1, ..., `steps` inner steps, each on all rows or on the next `batch_size`."""
        num_tasks = len(support.mask)

        def losses_of(params: Params, step: int, rows: Examples) -> Tensor:
            mask = self.mask_or_none(rows.mask)
            prediction = self.predict({**params, **self.norm(step, num_tasks)}, rows.x, mask)
            return masked_mean(self.task.loss(prediction, rows.y), mask)

        initial = self.initial(support)
        path = inner_loop(
            losses_of,
            initial,
            self.update,
            steps,
            data=lambda step: (minibatch(support, step, batch_size),),
            detached_steps=self.meta_gradient.detached_steps(steps, self.outer_step),
            weight_decay=self.inner_weight_decay,
            clip=self.inner_clip,
            checkpoint_steps=self.checkpoint_steps,
            idle=self.idle,
            first=self.first_gradients if self.starts_shared(initial, support) else None,
        )
        for step, params in enumerate(path):
            # Queries meet the norms of the step that led to the parameters.
            yield {**params, **self.norm(max(step - 1, 0), num_tasks)}

    def starts_shared(self, initial: Params, support: Examples) -> bool:
        """Whether `first_gradients` are those of the first step; a compiler does as well without."""
        return (
            self.shares
            and self.__dict__.keys().isdisjoint(FIRST_STEP)
            and self.engine == "vectorised"
            and COMPILER.get() is None
            and all(p.requires_grad for p in initial.values())
            and stacked.knows(self.base_layer, support.x)
            and not is_traced()
        )

    def first_gradients(self, params: Params, rows: Examples, *, create_graph: bool) -> Params:
        """Each task's gradient of the support loss at the initialisation."""

        def losses_of(prediction: Tensor) -> Tensor:
            return masked_mean(self.task.loss(prediction, rows.y), self.mask_or_none(rows.mask))

        return shared_start.gradients(self.base_layer, losses_of, params, rows.x, create_graph=create_graph)


def minibatch(examples: Examples, step: int, size: int | None) -> Examples:
    """Rows `step * size` to `(step + 1) * size`, going round; all rows if `size` is None."""
    if size is None:
        return examples
    rows = torch.arange(step * size, (step + 1) * size, device=examples.mask.device) % examples.mask.shape[1]
    return Examples(*(leaf[:, rows] for leaf in examples))
