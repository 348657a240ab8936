"""How much memory a computation takes, counted where torch makes its tensors."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue
from mlframework.number_format import shown

__all__ = ["PeakMemory", "check_episodes"]

#: Copies of an episode while it is drawn: numbers in 64 bits, and what they are drawn from.
COPIES = 3


def check_episodes(config: DictConfig, spec: TaskSpec) -> None:
    """Refuses tasks of so many examples, or so many tasks at a time, that this machine's memory cannot hold them.

    Nothing is drawn: the size follows from the keys that all tasks have, and what is not among them counts as one.

    Args:
        config: of the run.
        spec: of its tasks.
    """
    each = 4 * math.prod(spec.x_shape) + 8  # an input, its target and its mask
    task = {f"task.{name}": most(config.task.get(name)) for name in ("n_way", "k_shot", "k_query")}
    examples = task["task.n_way"] * (task["task.k_shot"] + task["task.k_query"])
    check_size(task, each * examples)
    check_size({"trainer.meta_batch": config.trainer.meta_batch}, each * examples * config.trainer.meta_batch)
    chunk = config.evaluation.get("chunk") if config.get("evaluation") else None
    if chunk is not None:
        check_size({"evaluation.chunk": chunk}, each * examples * min(chunk, config.evaluation.get("tasks", chunk)))


def check_size(counts: Mapping[str, int], size: float) -> None:
    """Refuses the largest of some counts if together they make episodes of too many bytes."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if COPIES * size > there:
        key = max(counts, key=counts.__getitem__)
        why = f"such episodes take {shown(COPIES * size / 1e9)} GB, and this machine has {shown(there / 1e9)} GB"
        raise InvalidValue(key, counts[key], why)


def most(count: Any) -> int:
    """The largest of a number, or a range of numbers."""
    numbers = count if isinstance(count, Sequence) else [count]
    return max((number for number in numbers if isinstance(number, int)), default=1)


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that were made within it and are still held, and of no others.

    Attributes:
        held, peak: bytes, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata not in given | self.known:
                self.follow(storage)
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in a nest."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
