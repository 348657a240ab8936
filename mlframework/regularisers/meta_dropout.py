"""Meta-dropout: learned, multiplicative noise on the support set of the inner loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlframework.backend.forward import swap_tensors
from mlframework.base_layers.perturbed import Perturbed
from mlframework.episode import Episode, Examples, Params
from mlframework.errors import UserError
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.meta_layers.regulariser import LossFn, Regulariser

__all__ = ["MetaDropout"]


class MetaDropout(Regulariser):
    """Puts normal noise on the factors of `Perturbed` layers while the inner loop reads the support set.

    The outer loop learns how each example is perturbed: the task's model must be right for the clean query set. The
    parameters of the factors must not adapt. Queries, validation and use have expected factors.

    Reference: Lee, Nam, Yang, Hwang, Meta Dropout, 2020, arXiv:1905.12914, section 3, equations 3 to 6. Deviations: one
        draw of each row of a support set serves all tasks and inner steps of an outer step; see `Perturbed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, int] = {}

    def attach(self, meta_layer: Any) -> None:
        if not hasattr(meta_layer, "inner_losses"):
            raise UserError(f"is on inner losses, and {type(meta_layer).__name__} has none: use algorithm=maml")
        layers = {n: m for n, m in meta_layer.base_layer.named_modules() if isinstance(m, Perturbed)}
        if not layers:
            raise UserError("needs perturbed layers: use base_layer=perturbed_conv4")
        for name in layers:
            if adapted := [own for own in meta_layer.adapted_names if own.startswith(f"{name}.scale.")]:
                raise UserError(f"{adapted[0]} must not adapt: use 'algorithm.adapts=head|block'")
        self.places = {name: layer.scale.out_features for name, layer in layers.items()}
        for number, layer in enumerate(layers.values()):
            self.register_buffer(f"noise_{number}", torch.zeros_like(layer.noise), persistent=False)

    def before_step(self, meta_layer: MetaLayer, episode: Episode, generator: torch.Generator) -> Episode:
        rows = episode.support.x.shape[1]
        for number, channels in enumerate(self.places.values()):
            name, shape = f"noise_{number}", (rows, channels)
            if self.get_buffer(name).shape != shape:
                self.register_buffer(name, self.get_buffer(name).new_zeros(shape), persistent=False)
            self.get_buffer(name).copy_(torch.randn(shape, generator=generator))
        return episode

    def meta_loss(self, meta_layer: Any, episode: Episode, loss_of: LossFn) -> tuple[Tensor, Metrics]:
        own = meta_layer.inner_losses
        noise = {f"{name}.noise": self.get_buffer(f"noise_{number}") for number, name in enumerate(self.places)}

        def perturbed(params: Params, step: int, support: Examples) -> Tensor:
            with swap_tensors(meta_layer.base_layer, noise):
                found: Tensor = own(params, step, support)
            return found

        meta_layer.inner_losses = perturbed
        try:
            return loss_of(episode)
        finally:
            del meta_layer.inner_losses
