"""What a computation costs, counted at torch's dispatcher: the same on any machine, whatever its load."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

import mlframework.backend.operators  # noqa: F401 - registers the operators that are given a formula here
from mlframework.backend.peak_memory import PeakMemory

__all__ = ["Operations", "PeakMemory"]

ours = torch.ops.mlframework


@register_flop_formula(
    [ours.convolve, ours.convolve_by_input, ours.unfolded, ours.unfolded_by_input],
    get_raw=True,
)
def convolution(images: Tensor, weight: Tensor, *args: Any, out_val: Tensor) -> int:
    """Operations of a convolution or of its gradient by the images: each result of the former takes a weight's row."""
    results = out_val if len(args) == 2 else images
    return 2 * results.numel() * math.prod(weight.shape[-3:])


@register_flop_formula([ours.convolve_by_weight, ours.unfolded_by_weight], get_raw=True)
def weight_gradient(grad: Tensor, images: Tensor, *args: Any, out_val: Tensor) -> int:
    """Operations of a convolution's gradient by the weight."""
    return 2 * grad.numel() * math.prod(out_val.shape[-3:])


class Operations(TorchDispatchMode):
    """Counts floating-point operations by formulas, which know matrix products and convolutions.

    Attributes:
        total: operations.
        calls: how many kernels were called, views included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result
