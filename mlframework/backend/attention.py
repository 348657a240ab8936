"""Torch's attention by kernels that have second derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable_attention"]


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Within this context torch's attention can be differentiated twice, in evaluation mode too.

    In evaluation mode `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` take a fused kernel that has no
    derivative; the flash kernels have a first derivative, but no second.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
