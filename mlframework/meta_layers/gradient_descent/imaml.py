"""iMAML: the meta-gradient of an inner problem that is solved, whichever way it was solved."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mlframework.episode import Episode, Params
from mlframework.errors import UserError
from mlframework.inner_loop.inner_loop import last
from mlframework.inner_loop.inner_update import at_least, positive
from mlframework.inner_loop.proximal import Proximal
from mlframework.meta_layers.gradient_descent.meta_gradients import InnerLearner, MetaGradient
from mlframework.meta_layers.meta_layer import Metrics
from mlframework.solvers.conjugate_gradient import conjugate_gradient, inner_product

__all__ = ["Implicit"]

log = logging.getLogger(__name__)


class Implicit(MetaGradient):
    """iMAML: the meta-gradient follows from where the inner loop ends, not from how it came there.

    Where the inner problem is solved, `phi = theta - grad L(phi) / lambda`, and so the derivative of phi by theta is
    `(I + H / lambda)^-1`, with H the Hessian of the support loss at phi. Its product with the gradient of the query
    loss is found by conjugate gradients with Hessian-vector products: memory and exactness do not depend on the inner
    steps, as long as they solve the problem. What does not adapt gets its own implicit gradient from the same equation.

    Two metrics say whether to believe it: `inner_residual`, the norm of `grad L(phi) + lambda (phi - theta)` relative
    to those of its two terms (1 before the first step, 0 at the solution), and `cg_residual`, that of the linear
    system relative to its right-hand side.

    Where these are not small, steps of Barzilai and Borwein and conjugate gradients may make roundings larger: in
    float32 such a meta-gradient is at times per cents off that of float64.

    Args:
        cg_steps: of conjugate gradients; each costs one Hessian-vector product.
        tolerance: the mean `inner_residual` above which one log line warns.

    Reference: Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit Gradients, 2019, arXiv:1909.04630,
        algorithms 1 and 2, lemma 1. Deviations: H is not damped further, as it is in the official code; where it is
        below -lambda along a direction, conjugate gradients stop before it.
    """

    uses_query_losses = False

    def __init__(self, cg_steps: int = 5, tolerance: float = 0.1) -> None:
        self.cg_steps, self.tolerance = at_least("cg_steps", cg_steps, 1), positive("tolerance", tolerance)
        self.warned = False

    def meta_loss(self, layer: InnerLearner, episode: Episode) -> tuple[Tensor, Metrics]:
        strength = strength_of(layer)
        start = layer.initial(episode.support)
        with torch.no_grad():
            trained = last(layer.trajectory(episode.support, layer.inner_steps))
        solved = {name: trained[name].detach().requires_grad_() for name in start}
        metrics = layer.query_metrics({**trained, **solved}, episode)
        losses = layer.inner_losses(solved, layer.inner_steps - 1, episode.support)
        gradient = gradients(losses, solved, create_graph=True)

        def multiply(vector: Params) -> Params:
            products = gradients(inner_product(gradient, vector), solved)
            return {name: value + products[name] / strength for name, value in vector.items()}

        solution = conjugate_gradient(multiply, gradients(metrics["query_loss"], solved), self.cg_steps)
        # At the solution this is `solved`; its derivatives by all that is learned, `solved` held fixed, are what
        # the implicit function theorem multiplies by the solution of the linear system.
        equation = {name: start[name] - gradient[name] / strength for name in start}
        surrogate = metrics["query_loss"] + inner_product(solution.x, equation)
        residual = inner_residual(start, solved, gradient, strength).detach()
        self.warn(residual)
        metrics = {**metrics, "inner_residual": residual, "cg_residual": solution.residual}
        return metrics["query_loss"].detach() + surrogate - surrogate.detach(), metrics

    def warn(self, residual: Tensor) -> None:
        """Says, once, that the inner problem has not converged; reading the residual then waits for the device."""
        if not self.warned and residual.mean() > self.tolerance:
            self.warned = True
            log.warning(
                "the inner problem has not converged (inner_residual %.2g): the meta-gradient is not that of the query "
                "loss; take more inner_steps, another inner rate, or a larger strength",
                residual.mean(),
            )


def strength_of(layer: InnerLearner) -> float:
    """Lambda, if the inner loop solves the problem that the meta-gradient is of."""
    if not isinstance(layer.update, Proximal):
        why = f"a proximal term: use algorithm/update=proximal, not {type(layer.update).__name__}"
        raise UserError(f"an implicit meta-gradient needs an inner problem with {why}")
    if layer.inner_clip is not None or layer.inner_weight_decay:
        why = "that of the support loss alone: no inner_clip, inner_weight_decay"
        raise UserError(f"an implicit meta-gradient is {why}")
    return layer.update.strength


def gradients(values: Tensor, params: Params, *, create_graph: bool = False) -> Params:
    """Each task's gradient of its value `[tasks]`; the graph stays for another one."""
    found = torch.autograd.grad(
        values.sum(), list(params.values()), retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(params, found, strict=True))


def inner_residual(start: Params, solved: Params, gradient: Params, strength: float) -> Tensor:
    """`|g + d| / (|g| + |d|)` of each task `[tasks]`, with `d = strength * (solved - start)`."""
    pull = {name: strength * (p - start[name]) for name, p in solved.items()}
    total = {name: gradient[name] + pull[name] for name in pull}
    norms = [inner_product(part, part).sqrt() for part in (total, gradient, pull)]
    return norms[0] / (norms[1] + norms[2]).clamp(min=torch.finfo(norms[0].dtype).tiny)
