"""The tensors that a module holds, and where."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlframework.backend.algorithm import Algorithm
from mlframework.backend.private import buffers_of, parameters_of

__all__ = ["Place", "found_at", "places_of", "tensors_of"]

#: Where a module holds a tensor, and by what name.
Place = tuple[dict[str, Any], str]


def tensors_of(module: Algorithm) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def places_of(module: Algorithm) -> list[Place]:
    """The places of parameters and buffers, where they may be replaced; finding them takes longer than a small step."""
    places = []
    for name in tensors_of(module):
        owner, _, own = name.rpartition(".")
        part = module.get_submodule(owner)
        parameters: dict[str, Any] = parameters_of(part)
        places.append((parameters if own in parameters else buffers_of(part), own))
    return places


def found_at(places: list[Place]) -> list[Tensor]:
    return [tensors[name] for tensors, name in places]
