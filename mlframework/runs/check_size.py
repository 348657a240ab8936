"""Refuses episodes that this machine's memory cannot hold, before any is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue
from mlframework.evaluation.number_format import shown

__all__ = ["check_episodes"]

#: Copies of an episode while it is drawn: numbers in 64 bits, and the arrays that they are drawn from.
COPIES = 3


def check_episodes(config: DictConfig, spec: TaskSpec) -> None:
    """Refuses more examples per task, or more tasks at a time, than this machine's memory can hold.

    Nothing is drawn: the size follows from the keys that all tasks have; a missing key counts as one.

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
    """Refuses the largest of some counts if `size`, in bytes, is too large for the memory."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if COPIES * size > there:
        key = max(counts, key=counts.__getitem__)
        why = f"such episodes take {shown(COPIES * size / 1e9)} GB, and this machine has {shown(there / 1e9)} GB"
        raise InvalidValue(key, counts[key], why)


def most(count: Any) -> int:
    """The number, or the largest of a range; 1 if there is none."""
    numbers = count if isinstance(count, Sequence) else [count]
    return max((number for number in numbers if isinstance(number, int)), default=1)
