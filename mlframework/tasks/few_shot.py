"""n-way k-shot classification from any class-indexed array."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import InvalidValue, UserError
from mlframework.tasks.data_folder import composed
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ArrayTasks", "ClassIndexed", "FewShotClassification", "hash_sorted", "split_by_hash"]


class ClassIndexed(NamedTuple):
    """Examples sorted by class; whatever the memory layout of `x`, episodes are contiguous."""

    x: Tensor  # [examples, *x_shape]; uint8 images in [0, 255] become floats in [0, 1] when they are drawn
    sizes: Tensor  # examples of each class [classes], in the order in which they stand in `x`
    names: tuple[str, ...]  # one per class, for figures and messages

    @classmethod
    def from_labels(cls, x: Tensor, y: Tensor) -> ClassIndexed:
        """Sorts examples `x` `[examples, ...]` by their labels `y` `[examples]`: any integers, or booleans.

        Raises:
            InvalidValue: an example has no label, a label no example, or labels are not integers.
        """
        if y.dim() != 1 or x.dim() < 1 or len(y) != len(x) or not len(y):
            what = f"one for each example: x is {tuple(x.shape)}"
            raise InvalidValue("y", f"labels of shape {tuple(y.shape)}", f"must be {what}")
        if y.is_floating_point() or y.is_complex():
            raise InvalidValue("y", f"labels of {y.dtype}", "must be integers: y.long(), if none is missing")
        labels, sizes = torch.unique(y, return_counts=True)
        return cls(x[torch.argsort(y, stable=True)], sizes, tuple(str(label) for label in labels.tolist()))

    @classmethod
    def from_classes(cls, names: Iterable[str], x: Tensor) -> ClassIndexed:
        """Classes of equal size: `x` `[classes, examples, *x_shape]`."""
        return cls(x.flatten(0, 1), torch.full((len(x),), x.shape[1]), tuple(names))

    def inputs(self, rows: Tensor) -> Tensor:
        """The inputs of rows `[...]`, as they are drawn."""
        x = self.x[rows]
        return x.float() / 255 if x.dtype == torch.uint8 else x


class FewShotClassification(TaskDistribution, ABC):
    """Draws `n_way` classes, then `k_shot` support and `k_query` query examples of each, without replacement.

    A class's number in a task is the order in which it was drawn, so labels are permuted from task to task. Rows stand
    shot by shot (`shot 0: class 0, 1, ...; shot 1: ...`), so that any slice of whole shots is balanced. A class with
    fewer than `k_shot + k_query` examples gives fewer queries, and the mask says so.

    A subclass implements `load`; see `ArrayTasks` for arrays at hand.

    Args:
        x_shape: the shape of one input.
        n_way: classes per task.
        k_shot: support examples per class, or `[low, high]` to draw their number anew for every task.
        k_query: query examples per class, at most.
        smallest_class: how many examples every class has at least, where that is known before they are read. Only if it
            is, and they are enough for all queries, can the spec say that no task is ragged.
    """

    def __init__(
        self,
        x_shape: tuple[int, ...],
        *,
        n_way: int,
        k_shot: int | Sequence[int],
        k_query: int,
        smallest_class: int | None = None,
    ) -> None:
        check_at_least(2, n_way=n_way)
        check_at_least(1, k_query=k_query)
        self.n_way, self.shots, self.k_query = n_way, shot_range(k_shot), k_query
        low, high = self.shots
        self.smallest_class = smallest_class
        if smallest_class is not None and smallest_class <= high:
            raise InvalidValue("k_shot", k_shot, f"must be below {smallest_class}, the size of the smallest class")
        ragged = low < high or smallest_class is None or smallest_class < high + k_query
        self.spec = TaskSpec("classification", tuple(x_shape), out_features=n_way, ragged=ragged)
        self._loaded: dict[Split, ClassIndexed] = {}

    @abstractmethod
    def load(self, split: Split) -> ClassIndexed:
        """The classes of a split; called once, at the first draw from it."""

    def classes(self, split: Split) -> ClassIndexed:
        """The classes of a split, checked: enough of them, with enough examples each."""
        if split not in self._loaded:
            data = self.load(split)
            self._check(data, split)
            self._loaded[split] = data._replace(x=data.x.contiguous())  # equal episodes give equal bits
        return self._loaded[split]

    def _check(self, data: ClassIndexed, split: Split) -> None:
        if len(data.names) != len(data.sizes):
            why = f"must be one for each of {len(data.sizes)} classes"
            raise InvalidValue("names", f"{len(data.names)} names", why)
        if int(data.sizes.sum()) != len(data.x):
            raise InvalidValue("sizes", f"{int(data.sizes.sum())} in all", f"must add up to {len(data.x)} examples")
        if len(data.sizes) < self.n_way:
            raise InvalidValue("n_way", self.n_way, f"the {split} split has only {len(data.sizes)} classes")
        smallest = int(data.sizes.argmin())
        size, which = int(data.sizes[smallest]), f"class {data.names[smallest]} ({split})"
        if size <= self.shots[1]:
            raise InvalidValue("k_shot", self.shots[1], f"{which} has {size} examples, and one must be left to query")
        if self.smallest_class is not None and size < self.smallest_class:
            raise InvalidValue("smallest_class", self.smallest_class, f"{which} has only {size} examples")

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        data = self.classes(split)
        drawn = self.drawn_classes(num_tasks, split, generator)
        sizes, starts = data.sizes[drawn], (data.sizes.cumsum(0) - data.sizes)[drawn]
        wanted = self.shots[1] + self.k_query
        picked = distinct(sizes, wanted, generator)  # [tasks, n_way, wanted]
        exists = torch.arange(wanted) < sizes[..., None]
        rows = starts[..., None] + torch.where(exists, picked, 0)
        x = data.inputs(rows.transpose(1, 2).flatten(1))
        y = torch.arange(self.n_way).repeat(num_tasks, wanted)
        examples = Examples(x, y, exists.transpose(1, 2).flatten(1).float())
        low, high = self.shots
        support = examples.rows(slice(self.n_way * high))
        if low < high:
            shots = torch.randint(low, high + 1, (num_tasks, 1), generator=generator)
            shot_of_row = torch.arange(high).repeat_interleave(self.n_way)
            support = support._replace(mask=support.mask * (shot_of_row < shots))
        return Episode(support, examples.rows(slice(self.n_way * high, None)))

    def drawn_classes(self, num_tasks: int, split: Split, generator: torch.Generator) -> Tensor:
        """The numbers of each task's classes, `[tasks, n_way]`."""
        return distinct(torch.full((num_tasks,), len(self.classes(split).sizes)), self.n_way, generator)

    def drawn_from(self, num_tasks: int, split: Split, generator: torch.Generator) -> list[tuple[str, ...]] | None:
        names = self.classes(split).names
        drawn = self.drawn_classes(num_tasks, split, generator).tolist()
        return [tuple(sorted({self.source_of(names[number]) for number in task})) for task in drawn]

    def source_of(self, name: str) -> str:
        """The source of a class; several classes may be views of one."""
        return name


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
        super().__init__(tuple(first.x.shape[1:]), n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=smallest)
        self.splits = dict(splits)

    def load(self, split: Split) -> ClassIndexed:
        if split not in self.splits:
            raise InvalidValue("splits", sorted(self.splits), f"there is no {split} split")
        return self.splits[split]


def distinct(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws `count` different integers below each of `sizes` `[...]`, in random order: `[..., count]`.

    If a size is below `count`, the numbers after it have no meaning. The work does not grow with the sizes.
    """
    uniform = torch.rand(count, *sizes.shape, generator=generator, dtype=torch.float64)
    drawn = torch.empty(*sizes.shape, 0, dtype=torch.int64)
    for i in range(count):
        rank = (uniform[i] * (sizes - i).clamp(min=1)).long()  # among the integers that are not drawn yet
        passed = drawn.sort(-1).values - torch.arange(i) <= rank[..., None]  # the drawn ones that stand before it
        drawn = torch.cat([drawn, (rank + passed.sum(-1))[..., None]], dim=-1)
    return drawn


def hash_sorted(names: Iterable[str]) -> list[str]:
    """Names in the order of their SHA-256: as good as random, and the same on any machine."""
    spelt: dict[str, str] = {}
    for name in names:
        other = spelt.setdefault(composed(name), name)
        if other != name:
            raise UserError(f"{other!a} and {name!a} are one name in two Unicode forms: rename or join them")
    return sorted(spelt.values(), key=lambda name: hashlib.sha256(composed(name).encode()).digest())


def split_by_hash(names: Iterable[str]) -> dict[Split, list[str]]:
    """The first 64 % of `hash_sorted` names to train with, the next 16 % to validate, the rest to test."""
    order = hash_sorted(names)
    validation, test = round(0.64 * len(order)), round(0.8 * len(order))
    return {"train": order[:validation], "validation": order[validation:test], "test": order[test:]}


def shot_range(k_shot: int | Sequence[int]) -> tuple[int, int]:
    """`[low, high]` of a number of shots that may be fixed."""
    pair = (k_shot, k_shot) if isinstance(k_shot, int) else tuple(k_shot) if isinstance(k_shot, Sequence) else ()
    if len(pair) == 2 and all(type(bound) is int for bound in pair) and 1 <= pair[0] <= pair[1]:
        return pair
    raise InvalidValue("k_shot", k_shot, "must be at least 1, or [low, high] with 1 <= low <= high")


def check_at_least(least: int, **settings: int) -> None:
    """Refuses settings that are not whole numbers of at least `least`."""
    for field, value in settings.items():
        if type(value) is not int or value < least:
            raise InvalidValue(field, value, f"must be a whole number of at least {least}")
