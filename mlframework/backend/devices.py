"""Differences between the CPU and an accelerator, beside where tensors are."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch

__all__ = ["UNDISTURBED", "fork_rng", "name_of", "synchronise"]

#: Held while only one thread may give the GPU work.
UNDISTURBED = threading.Lock()


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Keeps the random numbers of the CPU and of a device as they are."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def synchronise() -> None:
    """Waits until the GPU has finished its work, before a clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def name_of(device: torch.device) -> str:
    """The product name of a GPU; the kind of any other device."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type
