"""n-way k-shot classification from any class-indexed array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidValue
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ArrayTasks", "ClassIndexed", "FewShotClassification"]


class ClassIndexed(NamedTuple):
    """Examples sorted by class.

    Attributes:
        x: `[examples, *x_shape]`; uint8 images in [0, 255] become floats in [0, 1] when they are drawn.
        sizes: examples of each class `[classes]`, in the order in which they stand in `x`.
        names: one name per class, for figures and messages.
    """

    x: Tensor
    sizes: Tensor
    names: tuple[str, ...]

    @classmethod
    def from_labels(cls, x: Tensor, y: Tensor) -> ClassIndexed:
        """Sorts examples `x` `[examples, ...]` by their integer labels `y` `[examples]`."""
        labels, sizes = torch.unique(y, return_counts=True)
        return cls(x[torch.argsort(y, stable=True)], sizes, tuple(str(label) for label in labels.tolist()))


class FewShotClassification(TaskDistribution, ABC):
    """Draws `n_way` classes, then `k_shot` support and `k_query` query examples of each, without replacement.

    A class's number in a task is the order in which it was drawn, so labels are permuted from task to task. Rows stand
    shot by shot (`shot 0: class 0, 1, ...; shot 1: ...`), so that any slice of whole shots is balanced. A class with fewer
    than `k_shot + k_query` examples gives fewer queries, and the mask says so.

    A subclass implements `load`; see `ArrayTasks` for arrays at hand.

    Args:
        x_shape: the shape of one input.
        n_way: classes per task.
        k_shot: support examples per class, or `[low, high]` to draw their number anew for every task.
        k_query: query examples per class, at most.
    """

    def __init__(
        self, x_shape: tuple[int, ...], *, n_way: int, k_shot: int | Sequence[int], k_query: int, ragged: bool = False
    ) -> None:
        low, high = (k_shot, k_shot) if isinstance(k_shot, int) else tuple(k_shot)
        if n_way < 2:
            raise InvalidValue("n_way", n_way, "must be at least 2")
        if not 1 <= low <= high:
            raise InvalidValue("k_shot", k_shot, "must be at least 1, or [low, high] with 1 <= low <= high")
        if k_query < 1:
            raise InvalidValue("k_query", k_query, "must be at least 1")
        self.n_way, self.shots, self.k_query = n_way, (low, high), k_query
        self.spec = TaskSpec("classification", tuple(x_shape), out_features=n_way, ragged=ragged or low < high)
        self._loaded: dict[Split, ClassIndexed] = {}

    @abstractmethod
    def load(self, split: Split) -> ClassIndexed:
        """The classes of a split; called once, at the first draw from it."""

    def classes(self, split: Split) -> ClassIndexed:
        """The classes of a split, checked: enough of them, with enough examples each."""
        if split not in self._loaded:
            self._loaded[split] = self._checked(self.load(split), split)
        return self._loaded[split]

    def _checked(self, data: ClassIndexed, split: Split) -> ClassIndexed:
        if len(data.sizes) < self.n_way:
            raise InvalidValue("n_way", self.n_way, f"the {split} split has only {len(data.sizes)} classes")
        smallest = int(data.sizes.argmin())
        if int(data.sizes[smallest]) <= self.shots[1]:
            why = f"class {data.names[smallest]} ({split}) has {int(data.sizes[smallest])} examples, and one must be left to query"
            raise InvalidValue("k_shot", self.shots[1], why)
        if int(data.sizes[smallest]) < self.shots[1] + self.k_query and not self.spec.ragged:
            self.spec = self.spec._replace(ragged=True)
        return data

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        data = self.classes(split)
        drawn = torch.rand(num_tasks, len(data.sizes), generator=generator).topk(self.n_way).indices  # [tasks, n_way]
        rows, exists = self._draw_rows(data, drawn, generator)  # [tasks, n_way, max_shot + k_query]
        x = data.x[rows.transpose(1, 2).flatten(1)]
        examples = Examples(
            x.float() / 255 if x.dtype == torch.uint8 else x,
            torch.arange(self.n_way).repeat(num_tasks, rows.shape[2]),
            exists.transpose(1, 2).flatten(1).float(),
        )
        split_at = self.n_way * self.shots[1]
        return self._with_random_shots(Episode(examples[:split_at], examples[split_at:]), generator)

    def _draw_rows(self, data: ClassIndexed, drawn: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of `data.x` for each drawn class, and whether there is such a row: both `[tasks, n_way, wanted]`."""
        wanted = self.shots[1] + self.k_query
        sizes, starts = data.sizes[drawn], (data.sizes.cumsum(0) - data.sizes)[drawn]
        longest = max(int(data.sizes.max()), wanted)
        order = torch.rand(*drawn.shape, longest, generator=generator)
        order[torch.arange(longest) >= sizes[..., None]] = 2.0  # beyond the class's end: drawn last
        order, picked = order.topk(wanted, largest=False, sorted=True)
        exists = order < 2.0
        return starts[..., None] + torch.where(exists, picked, 0), exists

    def _with_random_shots(self, episode: Episode, generator: torch.Generator) -> Episode:
        """Masks the support beyond a number of shots drawn for each task."""
        low, high = self.shots
        if low == high:
            return episode
        shots = torch.randint(low, high + 1, (episode.num_tasks, 1), generator=generator)
        shot_of_row = torch.arange(high).repeat_interleave(self.n_way)
        support = episode.support._replace(mask=episode.support.mask * (shot_of_row < shots))
        return episode._replace(support=support)


class ArrayTasks(FewShotClassification):
    """n-way k-shot tasks from arrays at hand.

    Args:
        splits: the classes of each split.
        n_way, k_shot, k_query: see `FewShotClassification`.

    >>> x, y = torch.randn(60, 3), torch.arange(6).repeat(10)
    >>> tasks = ArrayTasks({"train": ClassIndexed.from_labels(x, y)}, n_way=3, k_shot=1, k_query=4)
    >>> tasks.sample(2, "train", torch.Generator().manual_seed(0)).query.x.shape
    torch.Size([2, 12, 3])
    """

    def __init__(
        self, splits: Mapping[Split, ClassIndexed], *, n_way: int, k_shot: int | Sequence[int], k_query: int
    ) -> None:
        first = next(iter(splits.values()))
        smallest = min(int(data.sizes.min()) for data in splits.values())
        super().__init__(tuple(first.x.shape[1:]), n_way=n_way, k_shot=k_shot, k_query=k_query)
        self.spec = self.spec._replace(ragged=self.spec.ragged or smallest < self.shots[1] + k_query)
        self.splits = dict(splits)

    def load(self, split: Split) -> ClassIndexed:
        if split not in self.splits:
            raise InvalidValue("splits", sorted(self.splits), f"there is no {split} split")
        return self.splits[split]
