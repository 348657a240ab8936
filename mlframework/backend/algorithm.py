"""What a compiled and planned step needs of an algorithm, as a meta layer has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from mlframework.backend.engine import Engine
from mlframework.episode import Episode

__all__ = ["Algorithm"]


class Algorithm(Protocol):
    """An `nn.Module` with a meta-loss.

    Attributes:
        engine: how the base layer runs over tasks.
        outer_step: outer steps taken so far.
    """

    engine: Engine
    outer_step: int

    def meta_loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each task `[tasks]`, to be differentiated, and the metrics, `[tasks]` each."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def get_submodule(self, target: str) -> nn.Module: ...
