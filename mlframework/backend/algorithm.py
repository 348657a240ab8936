"""What a compiled and planned step needs of an algorithm, as a meta layer has it, and the tensors that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from mlframework.episode import Episode, Examples

__all__ = ["Algorithm", "Engine", "tensors_of"]

#: How a base layer runs over tasks; see `mlframework.backend.engine`.
Engine = Literal["vectorised", "loop"]


class Algorithm(Protocol):
    """An `nn.Module` with a meta-loss."""

    engine: Engine
    outer_step: int  # outer steps taken so far

    @property
    def base_layer(self) -> nn.Module: ...

    def adapt(self, support: Examples) -> Any: ...

    def predict(self, adapted: Any, x: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def mask_or_none(self, mask: Tensor) -> Tensor | None: ...

    def meta_loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each task `[tasks]`, to be differentiated, and the metrics, `[tasks]` each."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


def tensors_of(module: Algorithm) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
