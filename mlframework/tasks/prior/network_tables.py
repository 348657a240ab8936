"""Tables from random networks: structural causal models, and Bayesian neural networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlframework.tasks.prior.table_generator import (
    TableGenerator,
    TableShape,
    checked_range,
    log_uniform,
    one_of,
    random_inputs,
    random_whole,
    standardised,
)

__all__ = ["NetworkTables"]


class NetworkTables(TableGenerator):
    """Columns and targets are nodes of a random layered network, through which noise flows.

    In a *causal* draw columns and targets are any of the nodes: a column may be a cause of the target or its effect.
    Otherwise the columns are the inputs and the targets are the last layer: a Bayesian neural network. Each node is a
    random activation of a sum over about half of the layer before, with noise.

    Args:
        layers: of the network, `[low, high]`; drawn for all tables of a draw together.
        hidden: nodes of a layer, at least as many as a table has targets.
        causal: the share of causal draws.
        noise: the standard deviation of a node's noise, `[low, high]` above 0, where a node itself has 1.

    Reference: Hollmann et al., TabPFN, 2023, arXiv:2207.01848, section 4 and appendix C. Deviations: nodes are
        standardised before they are activated, and their activations differ within a network.
    """

    def __init__(
        self,
        *,
        layers: int | Sequence[int] = (1, 4),
        hidden: int = 16,
        causal: float = 0.6,
        noise: float | Sequence[float] = (0.01, 0.5),
    ) -> None:
        self.layers = checked_range("layers", layers, least=1, whole=True)
        self.noise = checked_range("noise", noise, least=1e-6)
        self.hidden, self.causal = hidden, causal

    def draw(self, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        causal = float(torch.rand((), generator=generator)) < self.causal
        causes = max(2, shape.columns // 2) if causal else shape.columns
        nodes = [random_inputs(shape._replace(columns=causes), generator)]
        width = max(self.hidden, shape.targets)
        for _ in range(random_whole(self.layers, generator)):
            nodes.append(self.layer(nodes[-1], width, generator))
        if not causal:
            return nodes[0], nodes[-1][..., : shape.targets]
        return picked(torch.cat(nodes, dim=-1), shape, generator)

    def layer(self, before: Tensor, width: int, generator: torch.Generator) -> Tensor:
        """The next nodes `[tables, rows, width]`."""
        tables, rows, fan_in = before.shape
        weights = torch.randn(tables, fan_in, width, generator=generator, dtype=before.dtype)
        weights = weights * (torch.rand(weights.shape, generator=generator) < 0.5)
        bias = torch.randn(tables, 1, width, generator=generator, dtype=before.dtype)
        slope = log_uniform(0.5, 2.0, (tables, 1, width), generator)
        z = slope * (standardised(before @ weights) + 0.5 * bias)
        forms = torch.stack([z, z.tanh(), z.relu(), z.abs(), z.square(), (z > 0).to(z.dtype)])
        spread = log_uniform(*self.noise, (tables, 1, width), generator)
        noise = torch.randn(tables, rows, width, generator=generator, dtype=before.dtype)
        return standardised(one_of(forms, generator, (tables, 1, width))) + spread * noise


def picked(nodes: Tensor, shape: TableShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns and targets from nodes `[tables, rows, nodes]`, other ones in each table; targets are no inputs."""
    tables, rows, count = nodes.shape
    order = torch.rand(tables, count, generator=generator).argsort(1)[:, : shape.columns + shape.targets]
    chosen = nodes.gather(2, order[:, None].expand(-1, rows, -1))
    return chosen[..., : shape.columns], chosen[..., shape.columns :]
