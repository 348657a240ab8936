"""The inverse of a quadratic program's matrix on its free entries, in the cheaper of two forms.

Entries are `[tasks, k, n]`, classes first. The matrix is the same kernel `K` for every class. A `FreeInverse` makes of
any `g` the `V = R g` with `V K = g` on the free entries and `V = 0` elsewhere; `R` is symmetric. If classes are
coupled, `V` sums to 0 over them, and `V K = g` holds up to a constant per example.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["FreeInverse", "centred", "free_inverse", "inverse", "rebuilt"]


def free_inverse(kernel: Tensor, state: Tensor, coupled: bool) -> FreeInverse:
    """The inverse of a kernel `[tasks, n, n]` where a state `[tasks, k, n]` is 0, in the form that is the cheaper.

    `ByClass` inverts `k` matrices of size `n`; `ByActive` factors one as large as there are active entries, a third of
    the work. It pays where few entries are active: for a few shots, or many features.
    """
    k, n = state.shape[-2:]
    active = state != 0
    # 1 for entries at a bound, 0 for free ones and for masked examples, [tasks, k n].
    active = (active & ~active.all(-2, keepdim=True)).flatten(-2).to(torch.float64)
    most = int(active.sum(-1).max())
    if coupled and most**3 < 3 * k * n**3:
        return ByActive.of(inverse(kernel), state, active, most)
    return ByClass.of(kernel, state, coupled)


def rebuilt(*parts: Tensor) -> FreeInverse:
    return ByClass(*parts) if len(parts) == len(ByClass._fields) else ByActive(*parts)


def inverse(matrix: Tensor) -> Tensor:
    """Of positive definite matrices; of matrices that rounding has left indefinite as well."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_inverse(factor) if not failed.any() else torch.linalg.pinv(matrix, hermitian=True)


def centred(values: Tensor) -> Tensor:
    """Without the mean over classes, which stand in the last axis but one."""
    return torch.sub(values, values.sum(-2, keepdim=True), alpha=1 / values.shape[-2])


class ByClass(NamedTuple):
    """A matrix per class, and their sum."""

    blocks: Tensor  # the inverse on each class's free entries, 0 elsewhere, [tasks, k, n, n]
    coupling: Tensor  # the inverse of their sum over classes, [tasks, n, n]; empty if classes are not coupled

    @classmethod
    def of(cls, kernel: Tensor, state: Tensor, coupled: bool) -> ByClass:
        free = state == 0
        both = free.unsqueeze(-1) & free.unsqueeze(-2)
        identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        blocks = torch.where(both, inverse(torch.where(both, kernel.unsqueeze(1), identity)), 0.0)
        if not coupled:
            return cls(blocks, kernel[..., :0, :0])
        nowhere_free = (~free.any(1)).to(kernel.dtype)
        return cls(blocks, inverse(blocks.sum(1) + torch.diag_embed(nowhere_free)))

    def __call__(self, g: Tensor) -> Tensor:
        """`V` of any `g`, `[tasks, k, n]` both."""
        v = times(self.blocks, g)
        if not self.coupling.shape[-1]:
            return v
        shared = (self.coupling @ v.sum(-2).unsqueeze(-1)).squeeze(-1)
        return v - times(self.blocks, shared.unsqueeze(-2))


def times(blocks: Tensor, g: Tensor) -> Tensor:
    """A matrix per class `[tasks, k, n, n]` times a vector per class `[tasks, 1 or k, n]`."""
    return (blocks @ g.unsqueeze(-1)).squeeze(-1)


class ByActive(NamedTuple):
    """The inverse without bounds, corrected so that active entries stay: `V = c(g) P - c(z) P`, with `z` on these.

    `c` subtracts the mean over classes, which commutes with the kernel, so that `P` is its plain inverse. `most` is the
    largest number of active entries of a task.
    """

    inverted: Tensor  # P, [tasks, n, n]
    free: Tensor  # 1 in free entries, 0 elsewhere, [tasks, k, n]
    order: Tensor  # the places of the active entries in [k n], then any, [tasks, most]
    counts: Tensor  # 1 for active entries, 0 after them, [tasks, most]
    factor: Tensor  # lower triangular, of the matrix from z to c(z) P, both on active entries, [tasks, most, most]

    @classmethod
    def of(cls, inverted: Tensor, state: Tensor, active: Tensor, most: int) -> ByActive:
        """That of the kernel's inverse and the active entries `[tasks, k n]`."""
        k, n = state.shape[-2:]
        free = (state == 0).to(inverted.dtype)
        counts, order = active.topk(most)
        example, label = order % n, order // n
        tasks = torch.arange(len(state), device=state.device)[:, None, None]
        # Rows of c: their products are 1 - 1/k for one class, -1/k for two, and 0 after the active entries.
        rows = (torch.eye(k, dtype=counts.dtype, device=counts.device) - 1 / k)[label] * counts.unsqueeze(-1)
        matrix = torch.bmm(rows, rows.mT).mul_(inverted[tasks, example.unsqueeze(-1), example.unsqueeze(-2)])
        matrix.diagonal(dim1=-2, dim2=-1).add_(1 - counts)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        return cls(inverted, free, order, counts, factor)

    def __call__(self, g: Tensor) -> Tensor:
        without = self.spread(self.free * g)
        if not self.order.shape[-1]:
            return self.free * without
        active = self.counts * without.flatten(-2).gather(-1, self.order)
        z = torch.cholesky_solve(active.unsqueeze(-1), self.factor).squeeze(-1)
        entries = torch.zeros_like(g).flatten(-2).scatter_add(-1, self.order, z).view_as(g)
        return self.free * (without - self.spread(entries))

    def spread(self, entries: Tensor) -> Tensor:
        return torch.bmm(centred(entries), self.inverted)


FreeInverse: TypeAlias = ByClass | ByActive
