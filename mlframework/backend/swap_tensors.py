"""A module that holds other tensors for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mlframework.backend.private import swapped

__all__ = ["is_tied", "swap_tensors"]


@contextmanager
def swap_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Puts tensors in the place of parameters and buffers, and then these back.

    What a module holds under two names is replaced under both. `torch.func.functional_call` does so too, but does not
    put back the parameters of a part that is used twice.

    Args:
        module: what is to hold them.
        tensors: by the names of `named_parameters` and `named_buffers`; those that are missing stay.
    """
    with swapped(module, tensors):
        yield


def is_tied(module: nn.Module) -> bool:
    """Whether a parameter has two names."""
    return len(list(module.parameters())) < len(list(module.named_parameters(remove_duplicate=False)))
