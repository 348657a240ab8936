"""Meta-regularisation on weights: noise on the parameters that all tasks share, and a penalty on what they know."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlframework.backend.forward import swap_tensors
from mlframework.episode import Episode
from mlframework.errors import UserError
from mlframework.inner_loop.inner_update import at_least, positive
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.meta_layers.regulariser import LossFn, Regulariser

__all__ = ["InformationPenalty", "kl_to_normal"]


class InformationPenalty(Regulariser):
    """Bounds the information about the training tasks in the parameters that do not adapt.

    Each of these is Gaussian: the base layer's own parameter is the mean, and the standard deviation is learned beside
    it. One draw serves all tasks of an outer step. The meta-loss grows by `weight` times the divergence
    `KL(N(mean, deviation^2) || N(0, prior^2))`, summed over these parameters. A network that solves the training tasks
    without their support sets needs precise parameters, and pays for them. Validation and use take the means.

    `algorithm.adapts` says which parameters adapt, and stay without noise: MAML needs one that leaves some out.

    Args:
        weight: of the divergence (beta).
        deviation: where the standard deviations start.
        prior: the standard deviation of the prior.

    Reference: Yin, Tucker, Zhou, Levine, Finn, Meta-Learning without Memorization, 2020, arXiv:1912.03820, section 4.2
        and algorithm 1 (MR-MAML (W)). Deviation: at meta-test the means predict, where the paper draws.
    """

    def __init__(self, *, weight: float, deviation: float, prior: float = 1.0) -> None:
        super().__init__()
        self.weight = at_least("weight", weight, 0)
        self.deviation, self.prior = positive("deviation", deviation), positive("prior", prior)
        self.names: list[str] = []
        self.log_deviations = nn.ParameterList()

    def attach(self, meta_layer: MetaLayer) -> None:
        adapted = getattr(meta_layer, "adapted_names", ())
        shared = {n: p for n, p in meta_layer.base_layer.named_parameters() if p.requires_grad and n not in adapted}
        if not shared:
            raise UserError(
                "is on parameters that do not adapt, and all adapt: choose some, as in algorithm.adapts=head"
            )
        self.names = list(shared)
        log_deviation = math.log(self.deviation)
        self.log_deviations = nn.ParameterList(torch.full_like(p, log_deviation) for p in shared.values())
        for number, p in enumerate(shared.values()):
            self.register_buffer(f"noise_{number}", torch.zeros_like(p), persistent=False)

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        for number in range(len(self.names)):
            noise = self.get_buffer(f"noise_{number}")
            noise.copy_(torch.randn(noise.shape, generator=generator))
        return episode

    def meta_loss(self, meta_layer: MetaLayer, episode: Episode, loss_of: LossFn) -> tuple[Tensor, Metrics]:
        means = [tensor_of(meta_layer.base_layer, name) for name in self.names]
        noises = [self.get_buffer(f"noise_{number}") for number in range(len(means))]
        scaled = [log.exp() * noise for log, noise in zip(self.log_deviations, noises, strict=True)]
        drawn = {name: mean + noise for name, mean, noise in zip(self.names, means, scaled, strict=True)}
        with swap_tensors(meta_layer.base_layer, drawn):
            losses, metrics = loss_of(episode)
        both = zip(means, self.log_deviations, strict=True)
        penalty = self.weight * sum(kl_to_normal(mean, log, self.prior) for mean, log in both)
        return losses + penalty, metrics


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The tensor in a parameter's place; in a compiled step that is no `nn.Parameter`, which `get_parameter` wants."""
    path, _, own = name.rpartition(".")
    return getattr(module.get_submodule(path), own)


def kl_to_normal(mean: Tensor, log_deviation: Tensor, prior: float) -> Tensor:
    """`KL(N(mean, deviation^2) || N(0, prior^2))`, summed over all numbers: a scalar."""
    log_ratio = log_deviation - math.log(prior)
    return ((2 * log_ratio).exp() + (mean / prior).square() - 1 - 2 * log_ratio).sum() / 2
