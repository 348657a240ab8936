"""What a computation costs, counted at torch's dispatcher: the same on any machine, whatever its load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mlframework.backend.machine import PeakMemory

__all__ = ["Operations", "PeakMemory"]


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> int:
    """Operations of a convolution's gradients; torch's own count takes groups of channels for one."""
    *_, (by_input, by_weight, _) = args
    return 2 * grad.numel() * weight[0].numel() * (by_input + by_weight)


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
        if func is torch.ops.aten.convolution_backward.default:
            self.total += convolution_backward(*args)
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result
