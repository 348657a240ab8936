"""Meta-Gradient-Descent: a functional inner loop of gradient steps on the support loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from mlframework.backend.forward import repeated
from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Episode, Examples, Params
from mlframework.inner_loop.inner_loop import inner_loop, last
from mlframework.inner_loop.inner_update import InnerUpdate, at_least, positive
from mlframework.meta_layers.gradient_descent.check_parts import built, check_parts
from mlframework.meta_layers.gradient_descent.inner_losses import InnerLoss, SupportLoss
from mlframework.meta_layers.gradient_descent.meta_gradients import MetaGradient
from mlframework.meta_layers.gradient_descent.per_step import LastStep, NormWeights, SharedNorm, StepWeights
from mlframework.meta_layers.meta_layer import BatchNormPolicy, MetaLayer, Metrics, learned_names
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["MAML"]


class MAML(MetaLayer):
    """Learns an initialisation from which a few gradient steps on the support loss fit a task.

    Three separate choices make its relatives: what is adapted (`adapts`), the update rule (`update`) and the way to the
    meta-gradient (`meta_gradient`). MAML adapts everything by SGD, exactly; FOMAML is first order; ANIL adapts the head
    alone and BOIL everything else; Meta-SGD learns the rates; Reptile takes the difference of parameters.

    Args:
        base_layer, task, frozen, batch_norm: see `MetaLayer`.
        update: builds the update rule from the adapted parameters, as in `functools.partial(SGD, lr=0.01)`.
        meta_gradient: `Exact()`, `FirstOrder()` or `ParameterDifference()`.
        inner_loss: builds what the inner loop descends from the task, as in `LearnedLoss`; None: the support loss.
        step_weights: how much the query loss after each inner step counts; None: only the last one.
        norm: builds, from the base layer, the weights of its batch norms at each inner step; None: always its own.
        inner_steps: inner steps while meta-training.
        test_inner_steps: inner steps in evaluation mode; None takes `inner_steps`.
        inner_weight_decay: share of each adapted parameter that is added to its inner gradient.
        inner_clip: the largest norm of a task's inner gradient; None for no limit.
        adapts: a regular expression for the parameters that adapt; the others are learned by the outer loop alone.
        checkpoint_steps: see `inner_loop`.

    Reference: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
        arXiv:1703.03400, algorithm 1. ANIL: Raghu et al. 2020, arXiv:1909.09157. BOIL: Oh et al., arXiv:2008.08882.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        task: TaskDistribution,
        *,
        update: Callable[[Params], InnerUpdate],
        meta_gradient: MetaGradient,
        inner_loss: Callable[[TaskDistribution], InnerLoss] | None = None,
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
        check_parts(update=update, inner_loss=inner_loss, norm=norm, meta_gradient=meta_gradient)
        self.inner_steps = at_least("inner_steps", inner_steps, 1)
        at_test = inner_steps if test_inner_steps is None else test_inner_steps
        self.test_inner_steps = at_least("test_inner_steps", at_test, 1)
        self.inner_weight_decay = at_least("inner_weight_decay", inner_weight_decay, 0)
        self.inner_clip = None if inner_clip is None else positive("inner_clip", inner_clip)
        self.norm = (norm or SharedNorm)(self.base_layer)
        self.adapted_names = learned_names(adapts, self.base_layer, field="adapts")
        self.update = built(update, {name: self.base_layer.get_parameter(name).detach() for name in self.adapted_names})
        self.inner_loss = (inner_loss or SupportLoss)(task)
        self.step_weights = meta_gradient.weighing(step_weights or LastStep())
        self.meta_gradient, self.checkpoint_steps, self.idle = meta_gradient, checkpoint_steps, set[str]()

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return not any(self.weights_of_steps()[:-1]) and self.meta_gradient.exact(self.inner_steps, self.outer_step)

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
        """Where each task's adapted parameters start, stacked; a subclass may let it depend on the support set."""
        return repeated(self.base_layer, self.adapted_names, len(support.mask))

    def trajectory(self, support: Examples, steps: int, *, batch_size: int | None = None) -> Iterator[Params]:
        """The stacked parameters after 0, 1, ..., `steps` inner steps, each on all rows or on the next `batch_size`."""
        path = inner_loop(
            self.inner_losses,
            self.initial(support),
            self.update,
            steps,
            data=lambda step: (support.minibatch(step, batch_size),),
            parts=self.inner_loss.parts(self.support_chunk),
            detached_steps=self.meta_gradient.detached_steps(steps, self.outer_step),
            weight_decay=self.inner_weight_decay,
            clip=self.inner_clip,
            checkpoint_steps=self.checkpoint_steps,
            idle=self.idle,
        )
        for step, params in enumerate(path):
            # Queries meet the norms of the step that led to the parameters.
            yield {**params, **self.norm(max(step - 1, 0), len(support.mask))}

    def inner_losses(self, params: Params, step: int, support: Examples) -> Tensor:
        """The inner loss of each task `[tasks]`, of which an inner step takes the gradient."""
        adapted = {**params, **self.norm(step, len(support.mask))}
        prediction = self.predict(adapted, support.x, self.mask_or_none(support.mask))
        return self.inner_loss(prediction, support, params, step)
