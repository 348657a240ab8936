"""Running a module with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mlframework.backend.private import swapped

__all__ = ["is_tied", "swap_tensors"]


@contextmanager
def swap_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Within this context tensors stand in for parameters and buffers.

    A tensor that has two names is replaced under both. `torch.func.functional_call` does so too, but does not
    put back the parameters of a part that is used twice.

    Args:
        module: holds the tensors meanwhile.
        tensors: by the names of `named_parameters` and `named_buffers`; those that are missing stay.
    """
    with swapped(module, tensors):
        yield


def is_tied(module: nn.Module) -> bool:
    """Whether a parameter has two names."""
    return len(list(module.parameters())) < len(list(module.named_parameters(remove_duplicate=False)))
