"""An outer step by each engine, side by side in one run: `python benchmarks/engines.py`.

Engines take turns, so that a drifting machine slows all alike; medians are printed with their ratio. Adam's step is
included.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from mlframework.base_layers import MLP, Conv4
from mlframework.engine import Engine
from mlframework.inner_updates import SGD
from mlframework.meta_layers.gradient_descent import MAML, Exact
from mlframework.outer_loop import OuterLoop
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TaskDistribution

ROUNDS = 15
ENGINES: tuple[Engine, ...] = ("vectorised", "loop")


def images(k_query: int) -> TaskDistribution:
    """5-way 1-shot on 28x28 noise: what is timed does not depend on what is learned."""
    data = ClassIndexed.from_labels(torch.rand(400, 1, 28, 28), torch.arange(20).repeat(20))
    return ArrayTasks({"train": data}, n_way=5, k_shot=1, k_query=k_query)


def workloads() -> dict[str, tuple[TaskDistribution, Callable[[], torch.nn.Module], int, int]]:
    """Name to task, base layer, tasks per step, inner steps."""
    waves, one, fifteen = Sinusoid(), images(1), images(15)
    return {
        "sinusoid, MLP 40-40, 25 tasks, 1 step": (waves, lambda: MLP(waves.spec), 25, 1),
        "sinusoid, MLP 40-40, 25 tasks, 5 steps": (waves, lambda: MLP(waves.spec), 25, 5),
        "5w1s, strided Conv4-64, 5 queries, 16 tasks, 1 step": (one, lambda: Conv4(one.spec), 16, 1),
        "5w1s, strided Conv4-64, 5 queries, 4 tasks, 5 steps": (one, lambda: Conv4(one.spec), 4, 5),
        "5w1s, pooled Conv4-32, 75 queries, 4 tasks, 1 step": (
            fifteen,
            lambda: Conv4(fifteen.spec, filters=32, downsample="pool"),
            4,
            1,
        ),
    }


def seconds(
    task: TaskDistribution, make_base_layer: Callable[[], torch.nn.Module], tasks: int, steps: int
) -> list[float]:
    """The median outer step of each engine."""
    episode = task.sample(tasks, "train", torch.Generator().manual_seed(0))
    loops = []
    for engine in ENGINES:
        update = functools.partial(SGD, lr=0.01)
        layer = MAML(make_base_layer(), task, update=update, meta_gradient=Exact(), inner_steps=steps)  # type: ignore[arg-type]
        layer.engine = engine
        optimizer = torch.optim.Adam(layer.parameters())
        loops.append(OuterLoop(layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)))
        for _ in range(2):
            loops[-1].step(episode)
    times: list[list[float]] = [[] for _ in loops]
    for _ in range(ROUNDS):
        for loop, taken in zip(loops, times, strict=True):
            began = time.perf_counter()
            loop.step(episode)
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    table = Table(
        "outer step",
        *ENGINES,
        "loop / vectorised",
        title=f"{torch.get_num_threads()} thread(s), torch {torch.__version__}",
    )
    for name, workload in workloads().items():
        vectorised, loop = seconds(*workload)
        table.add_row(name, f"{vectorised * 1e3:.1f} ms", f"{loop * 1e3:.1f} ms", f"{loop / vectorised:.1f}x")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
