"""What is learned in outer_step.py: networks, tasks and heads, the same in every process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from memory import LENGTH, SIZES, VOCABULARY

from mlframework.base_layers import MLP, BaseLayer, Conv4, Transformer
from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TaskDistribution

__all__ = ["QUICK", "WORKLOADS", "Family", "Head", "Network", "Workload"]

Network = Literal["mlp", "strided", "pooled", "transformer"]
Head = Literal["prototypes", "ridge", "svm"]


class Family(NamedTuple):
    """A network and its tasks.

    Attributes:
        network: what kind of network it is, for those who write it anew.
        task: makes the task distribution.
        base_layer: makes the network.
        head: what is fitted to the network's features; None: the whole network is adapted, by MAML.
    """

    network: Network
    task: Callable[[], TaskDistribution]
    base_layer: Callable[[TaskSpec], BaseLayer]
    head: Head | None = None


class Workload(NamedTuple):
    """What one outer step works on.

    Attributes:
        family: a name in `FAMILIES`.
        tasks: in the meta-batch.
        inner_steps: of gradient descent at `INNER_LR`; 0 with a head.
        long: whether it is left out unless asked for.
        first_order: whether inner gradients are constants to the meta-gradient.
        double: whether all numbers are float64.
        device: where it is learned.
    """

    family: str
    tasks: int
    inner_steps: int = 0
    long: bool = False
    first_order: bool = False
    double: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in `W1-sinusoid-25x5`: tasks, by inner steps."""
        return f"{self.family}-{self.tasks}" + (f"x{self.inner_steps}" if self.inner_steps else "")

    @property
    def network(self) -> Network:
        return FAMILIES[self.family].network

    @property
    def head(self) -> Head | None:
        return FAMILIES[self.family].head

    def make(self) -> tuple[TaskDistribution, BaseLayer, Episode]:
        """The same weights and the same meta-batch in every process."""
        torch.manual_seed(0)
        family = FAMILIES[self.family]
        task = family.task()
        base_layer = family.base_layer(task.spec).to(self.device)
        episode = task.sample(self.tasks, "train", torch.Generator().manual_seed(0)).to(self.device)
        return (task, base_layer.double(), in_double(episode)) if self.double else (task, base_layer, episode)


def in_double(episode: Episode) -> Episode:
    parts = (Examples(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in part)) for part in episode)
    return Episode(*parts)


def images(*x_shape: int, k_shot: int, k_query: int) -> TaskDistribution:
    """5-way noise: what is timed does not depend on what is learned."""
    per_class = k_shot + k_query
    data = ClassIndexed.from_labels(torch.rand(10 * per_class, *x_shape), torch.arange(10).repeat(per_class))
    return ArrayTasks({"train": data}, n_way=5, k_shot=k_shot, k_query=k_query)


class RandomText(TaskDistribution):
    """Tokens without sense: five rows to adapt to, five to be judged by."""

    spec = TaskSpec("sequence", (LENGTH,), VOCABULARY, ragged=False)

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        tokens = torch.randint(VOCABULARY, (num_tasks, 10, LENGTH + 1), generator=generator)
        examples = Examples(tokens[..., :-1], tokens[..., 1:], torch.ones(num_tasks, 10, LENGTH))
        return Episode(examples.rows(slice(5)), examples.rows(slice(5, None)))


STRIDED, POOLED = (functools.partial(Conv4, downsample=downsample) for downsample in ("stride", "pool"))
NARROW = functools.partial(Conv4, filters=32, downsample="pool")
OMNIGLOT, MINI_IMAGENET = functools.partial(images, 1, 28, 28), functools.partial(images, 3, 84, 84)
FIVE_SHOT = functools.partial(OMNIGLOT, k_shot=5, k_query=15)

FAMILIES = {
    "W1-sinusoid": Family("mlp", Sinusoid, MLP),
    "W2-strided": Family("strided", functools.partial(OMNIGLOT, k_shot=1, k_query=1), STRIDED),
    "W2-pooled": Family("pooled", functools.partial(OMNIGLOT, k_shot=1, k_query=15), POOLED),
    "W3-1shot": Family("pooled", functools.partial(MINI_IMAGENET, k_shot=1, k_query=5), NARROW),
    "W3-5shot": Family("pooled", functools.partial(MINI_IMAGENET, k_shot=5, k_query=5), NARROW),
    **{
        f"W4-text-{size.name.replace(' ', '')}": Family(
            "transformer",
            RandomText,
            functools.partial(Transformer, width=size.width, depth=size.depth, heads=size.heads),
        )
        for size in SIZES[:2]
    },
    "W5-prototypes": Family("strided", FIVE_SHOT, STRIDED, "prototypes"),
    "W5-ridge": Family("strided", FIVE_SHOT, STRIDED, "ridge"),
    "W5-svm": Family("strided", FIVE_SHOT, STRIDED, "svm"),
}

WORKLOADS = (
    Workload("W1-sinusoid", 1, 1),
    Workload("W1-sinusoid", 25, 1),
    Workload("W1-sinusoid", 256, 1),
    Workload("W1-sinusoid", 25, 5),
    Workload("W1-sinusoid", 25, 20),
    Workload("W2-strided", 4, 5),
    Workload("W2-strided", 32, 1),
    Workload("W2-pooled", 4, 5),
    Workload("W3-1shot", 1, 2),
    Workload("W3-5shot", 1, 2),
    Workload("W3-1shot", 4, 5, long=True),
    Workload("W3-5shot", 4, 5, long=True),
    Workload("W4-text-0.2M", 16, 3),
    Workload("W4-text-1M", 16, 3),
    Workload("W5-prototypes", 8),
    Workload("W5-ridge", 8),
    Workload("W5-svm", 8),
)
QUICK = tuple(
    workload
    for workload in WORKLOADS
    if workload.name in ("W1-sinusoid-25x1", "W1-sinusoid-25x5", "W2-strided-4x5", "W5-prototypes-8")
)
