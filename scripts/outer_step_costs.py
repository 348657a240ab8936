"""What one outer step of each gradient-based algorithm costs, counted: operations and peak memory.

Conv4 with 64 filters, one task, 5-way 5-shot with as many queries. Counted by torch's own counter and dispatcher, so
that the machine and its load do not matter. Prints the table of docs/meta_gradient_descent.md.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mlframework import build
from mlframework.outer_loop import meta_gradient
from mlframework.tasks import ArrayTasks, ClassIndexed

ALGORITHMS = (
    "maml",
    "maml algorithm.checkpoint_steps=true",
    "fomaml",
    "maml algorithm/meta_gradient=truncated algorithm.meta_gradient.steps=1",
    "anil",
    "boil",
    "meta_sgd",
    "maml_plus_plus",
    "meta_curvature",
    "learned_update",
    "proto_maml",
    "cavia_film",
    "reptile",
    "imaml",
    "lora",
    "joint",
)
STEPS = (1, 5, 16)


class Operations(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that were made within it and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def images() -> ArrayTasks:
    """5-way 5-shot, with as many queries."""
    x = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return ArrayTasks({"train": ClassIndexed.from_labels(x, torch.arange(100) % 10)}, n_way=5, k_shot=5, k_query=5)


def costs(overrides: str, task: ArrayTasks, steps: int) -> tuple[float, float]:
    """Operations of one task's outer step in forward passes over the support set, and its peak memory in MB."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", ["task=glyphs", *f"algorithm={overrides}".split()])
    config.algorithm.inner_steps = steps
    meta_layer = build.build_meta_layer(config, task)
    meta_layer.engine = "loop"
    meta_layer.outer_step = 10**9  # what is annealed has ended
    episode = task.sample(1, "train", torch.Generator().manual_seed(0))
    with Operations() as one:
        meta_layer.base_layer(episode.support.x[0])
    with Operations() as whole:
        meta_gradient(meta_layer, episode)
    meta_layer.zero_grad()
    with PeakMemory() as memory:  # apart: the counter itself holds on to tensors
        meta_gradient(meta_layer, episode)
    return whole.total / one.total, memory.peak / 1e6


def main() -> None:
    torch.set_num_threads(1)
    task = images()
    print("| `algorithm=` | passes at 1 / 5 / 16 inner steps | MB at 1 / 5 / 16 inner steps |")
    print("| --- | --- | --- |")
    for overrides in ALGORITHMS:
        columns = zip(*(costs(overrides, task, steps) for steps in STEPS), strict=True)
        cells = (" / ".join(f"{value:.0f}" for value in column) for column in columns)
        print(f"| `{overrides}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
