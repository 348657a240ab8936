"""The peak memory of a computation, counted where torch makes its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlframework.backend.private import TorchDispatchMode, storage_key, tree_leaves

__all__ = ["PeakMemory"]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still held.

    Attributes:
        held, peak: bytes, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(storage) for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage_key(storage) not in given | self.known:
                self.follow(storage)
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage_key(storage))
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.forget, storage_key(storage), storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in a nest."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
