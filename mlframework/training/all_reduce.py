"""The meta-gradient of a whole meta-batch, of which each rank has that of its own tasks: one all-reduce a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mlframework import processes
from mlframework.backend.step import Gradients

__all__ = ["AllReduce"]


class AllReduce:
    """Sums over the ranks the mean gradients, the values of each task, and notes, as one tensor.

    Args:
        learned: the meta-parameters by name.
    """

    def __init__(self, learned: Mapping[str, nn.Parameter]) -> None:
        self.learned = learned
        self.flat = torch.empty(0)

    def __call__(self, found: Gradients, notes: Sequence[float], tasks: int) -> tuple[Gradients, list[float]]:
        """The gradients and the values of all tasks, and the sums of the notes.

        Args:
            found: of this rank's share of the meta-batch; its gradients are divided by the number of all `tasks`.
            notes: numbers for the other ranks.
        """
        values = {"meta_loss": found.losses, **found.metrics}
        table = torch.zeros(len(values), tasks, dtype=found.losses.dtype, device=found.losses.device)
        table[:, processes.share(tasks)] = torch.stack([value.to(table.dtype) for value in values.values()])
        tail = torch.cat([table.flatten(), table.new_tensor(notes)])
        by_name = self.views(found, len(tail))
        for name, view in by_name.items():
            view.copy_(found.by_name[name])
        self.flat[-len(tail) :] = tail
        processes.summed(self.flat)
        tail = self.flat[-len(tail) :].clone()
        rows = tail[: table.numel()].view_as(table).to(found.losses.dtype)
        metrics = dict(zip(values, rows, strict=True))
        losses = metrics.pop("meta_loss")
        grads = {name: view.to(self.learned[name].dtype) for name, view in by_name.items()}
        return found._replace(losses=losses, metrics=metrics, by_name=grads), tail[table.numel() :].tolist()

    def views(self, found: Gradients, more: int) -> dict[str, Tensor]:
        """Views of one flat tensor, with the shapes and strides of the meta-parameters, on which optimizers rely.

        The tensor has room for `more` numbers at its end.
        """
        names = [name for name in self.learned if name in found.by_name]
        dtype = found.losses.dtype
        for name in names:
            dtype = torch.promote_types(dtype, self.learned[name].dtype)
        sizes = [self.learned[name].numel() for name in names]
        if len(self.flat) != sum(sizes) + more or self.flat.dtype != dtype:
            self.flat = torch.zeros(sum(sizes) + more, dtype=dtype, device=found.losses.device)
        parts = self.flat[: sum(sizes)].split(sizes)
        learned = (self.learned[name] for name in names)
        return {
            n: part.as_strided(p.shape, p.stride(), part.storage_offset())
            for n, part, p in zip(names, parts, learned, strict=True)
        }
