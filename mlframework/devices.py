"""What differs between the CPU and an accelerator, beside where tensors are."""

from __future__ import annotations

import functools
import platform
from contextlib import AbstractContextManager

import torch

__all__ = ["fork_rng", "hardware", "synchronise"]


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Keeps the random numbers of the CPU and of a device as they are."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def synchronise() -> None:
    """Waits until GPUs have done what they were asked to, which returns before: for whoever looks at a clock."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@functools.cache
def hardware() -> str:
    """The names of the processor and of the GPUs."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([platform.processor() or platform.machine(), *names])
