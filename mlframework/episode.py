"""The data types of the whole package: examples, an episode, and the spec of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mlframework.errors import InvalidValue, nearest

__all__ = ["Episode", "Examples", "Kind", "Params", "Split", "TaskSpec", "masked_mean"]

Kind = Literal["regression", "classification", "sequence"]
Split = Literal["train", "validation", "test"]

#: Named tensors; stacked, each is `[tasks, *shape]`.
Params = Mapping[str, Tensor]


class Examples(NamedTuple):
    """Inputs with their targets; by the mask, tasks of unequal size share one shape."""

    x: Tensor  # float features, or integer tokens, [tasks, n, *x_shape]
    y: Tensor  # targets, of which class ids are int64, [tasks, n, *y_shape]
    mask: Tensor  # 1 or True where an example counts, 0 or False where it is padding, [tasks, n, *positions]

    def to(self, device: torch.device | str) -> Examples:
        return Examples(*(leaf.to(device) for leaf in self))

    def rows(self, rows: slice) -> Examples:
        """The same tasks with a slice of their examples."""
        return Examples(self.x[:, rows], self.y[:, rows], self.mask[:, rows])

    def parts(self, size: int) -> Iterator[Examples]:
        """The same tasks, at most `size` of their rows at a time."""
        return (self.rows(slice(start, start + size)) for start in range(0, self.mask.shape[1], size))

    def counts(self, *, ragged: bool) -> Tensor:
        """How many examples, or positions, of each task count `[tasks]`, in 64 bits; unless tasks are ragged, all."""
        mask = self.mask if ragged else torch.ones_like(self.mask)
        return mask.flatten(1).double().sum(1)

    def minibatch(self, step: int, size: int | None) -> Examples:
        """Rows `step * size` to `(step + 1) * size`, going round; all rows if `size` is None."""
        if size is None:
            return self
        rows = torch.arange(step * size, (step + 1) * size, device=self.mask.device) % self.mask.shape[1]
        return Examples(*(leaf[:, rows] for leaf in self))


class Episode(NamedTuple):
    """A meta-batch of tasks: the examples that each task adapts to, and those of its query loss."""

    support: Examples
    query: Examples

    @property
    def num_tasks(self) -> int:
        return len(self.support.mask)

    @property
    def device(self) -> torch.device:
        return self.support.mask.device

    def to(self, device: torch.device | str) -> Episode:
        return Episode(*(part.to(device) for part in self))

    def tasks(self, rows: slice | list[int]) -> Episode:
        """The episode of some of the tasks."""
        return Episode(*(Examples(*(leaf[rows] for leaf in part)) for part in self))

    def chunks(self, size: int) -> Iterator[Episode]:
        """Episodes of at most `size` tasks that together are this one."""
        if size >= self.num_tasks:
            return iter((self,))
        return (self.tasks(slice(start, start + size)) for start in range(0, self.num_tasks, size))

    @classmethod
    def stack(cls, episodes: Sequence[Episode]) -> Episode:
        """One episode of all the tasks of several."""
        parts = zip(*episodes, strict=True)
        return cls(*(Examples(*(torch.cat(leaves) for leaves in zip(*part, strict=True))) for part in parts))

    def joined(self) -> Examples:
        """Support and query as one set of examples `[tasks, n_support + n_query, ...]`."""
        return Examples(*(torch.cat(leaves, dim=1) for leaves in zip(self.support, self.query, strict=True)))

    def hash(self) -> str:
        """Sixteen hexadecimal digits that tell this episode from any other: same digits, same tasks."""
        digest = hashlib.sha256()
        for leaf in (*self.support, *self.query):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class _TaskSpec(NamedTuple):
    kind: Kind  # predictions are numbers, one class per example, or one class per position
    x_shape: tuple[int, ...]  # of one input
    out_features: int  # numbers that the model emits per example (or per position): values, or logits of classes
    ragged: bool = True  # whether masks may hold zeros; if they never do, layers that mix examples are faster
    blocks: tuple[int, ...] | None = None  # widths of the parts of a flat input, one for each attribute; None: no parts


class TaskSpec(_TaskSpec):
    """The properties of every task that are known before an episode is drawn; base layers size themselves by it.

    Raises:
        InvalidValue: an attribute has a value that no task can have.
    """

    __slots__ = ()

    def __new__(
        cls,
        kind: Kind,
        x_shape: Sequence[int],
        out_features: int,
        ragged: bool = True,
        blocks: Sequence[int] | None = None,
    ) -> TaskSpec:
        kinds = get_args(Kind)
        if kind not in kinds:
            raise InvalidValue("kind", kind, f"must be one of {', '.join(kinds)}{nearest(str(kind), kinds)}")
        if isinstance(x_shape, str) or not isinstance(x_shape, Sequence) or not all(map(is_size, x_shape)):
            raise InvalidValue("x_shape", x_shape, "must hold whole numbers of at least 1: the shape of one input")
        if not is_size(out_features):
            raise InvalidValue("out_features", out_features, "must be a whole number of at least 1")
        if not isinstance(ragged, bool):
            raise InvalidValue("ragged", ragged, "must be true or false")
        blocks = None if blocks is None else tuple(blocks)
        if blocks is not None and not (all(map(is_size, blocks)) and (sum(blocks),) == tuple(x_shape)):
            raise InvalidValue("blocks", blocks, f"must be widths that add up to x_shape, {tuple(x_shape)}")
        return super().__new__(cls, kind, tuple(x_shape), out_features, ragged, blocks)

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> TaskSpec:  # type: ignore[override]
        """`_replace` goes through here, and is checked as well."""
        return cls(*iterable)

    def zeros(self, count: int, device: torch.device | None = None) -> Tensor:
        """Inputs of zeros `[count, *x_shape]`, to ask a module what shape it gives."""
        dtype = torch.long if self.kind == "sequence" else torch.get_default_dtype()
        return torch.zeros(count, *self.x_shape, dtype=dtype, device=device)


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean per task `[tasks]` of the values `[tasks, n, *positions]` that count; 0 where nothing counts.

    The mask has the shape of the values: 1 counts, 0 does not; None: all count.
    """
    axes = tuple(range(1, values.dim()))
    if mask is None:
        return values.mean(axes)
    mask = mask.to(values.dtype)
    # `where` rather than a product: padding may hold anything, an infinite loss included.
    kept = torch.where(mask > 0, values, torch.zeros_like(values))
    return kept.sum(axes) / mask.sum(axes).clamp(min=1)
