"""What one outer step of every algorithm costs: `python benchmarks/costs.py [--quick] [--json FILE]`.

Counted, for one task, by torch's own formulas and its dispatcher, so that the machine and its load do not matter:
operations, in forward passes over the support set, and peak memory beside the parameters. Timed: a step of 16 tasks
with its update, the median over turns that all algorithms take in one process.

Conv4 with 64 filters, strided, 5-way 5-shot with as many queries, on noise; what takes only text reads eight rows of 64
random bytes, by the transformer of `task=text_lists`. The formulas know matrix products and convolutions, and not the
solvers of the Meta-SVMs, which are small beside the features and run in float64.

`--json FILE` keeps the result; scripts/performance.py draws docs/performance.md from results/benchmarks/costs*.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from counters import Operations, PeakMemory
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from memory import RandomText
from omegaconf import DictConfig
from solvers import machine

from mlframework.files import write_json
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs import build
from mlframework.tasks import ArrayTasks, ClassIndexed, TaskDistribution
from mlframework.training.meta_gradient import meta_gradient
from mlframework.training.outer_loop import OuterLoop

CONF = Path(__file__).parents[1] / "conf" / "algorithm"

#: Beside the presets: what saves memory or time.
VARIANTS = (
    "maml algorithm.checkpoint_steps=true",
    "maml algorithm/meta_gradient=truncated algorithm.meta_gradient.steps=1",
)
#: Inner steps that are counted, and those that are timed too.
COUNTED, TIMED = (1, 5, 16), (1, 5)
QUICK = (1,)
TASKS, TURNS = 16, 3
#: An outer step at which what is annealed has ended.
LATE = 10**9


def algorithms() -> list[str]:
    """Every preset, and the variants, each behind what it is a variant of."""
    presets = sorted(path.stem for path in CONF.glob("*.yaml"))
    return [
        name for preset in presets for name in (preset, *(v for v in VARIANTS if v.startswith(f"{preset} algorithm")))
    ]


def images() -> TaskDistribution:
    """5-way 5-shot, with as many queries."""
    x = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return ArrayTasks({"train": ClassIndexed.from_labels(x, torch.arange(100) % 10)}, n_way=5, k_shot=5, k_query=5)


def config_of(overrides: str, steps: int | None) -> tuple[DictConfig, TaskDistribution]:
    """An algorithm's config, and the task that it is given."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        name, *rest = overrides.split()
        chosen = compose("train", [f"algorithm={name}"])
        classifies = "classification" in get_class(chosen.algorithm._target_).kinds
        task = "glyphs" if classifies else "text_lists"
        config = compose("train", [f"task={task}", f"algorithm={name}", *rest])
    if steps is not None:
        config.algorithm.inner_steps = steps
    return config, images() if classifies else RandomText()


def make(overrides: str, steps: int | None) -> tuple[MetaLayer, TaskDistribution]:
    """An algorithm, past what it anneals."""
    torch.manual_seed(0)
    config, task = config_of(overrides, steps)
    layer = build.build_meta_layer(config, task)
    layer.outer_step = LATE
    return layer, task


def counted(overrides: str, steps: int | None) -> dict[str, float]:
    """Operations and memory of one task's outer step.

    Returns:
        passes: operations in forward passes over the support set.
        flops: operations.
        mb: the peak of what tensors hold, beside the parameters.
    """
    layer, task = make(overrides, steps)
    episode = task.sample(1, "train", torch.Generator().manual_seed(0))
    with Operations() as one:
        layer.base_layer(episode.support.x[0])
    with Operations() as whole:
        meta_gradient(layer, episode)
    layer.zero_grad()
    with PeakMemory() as memory:  # apart: the counter itself holds on to tensors
        meta_gradient(layer, episode)
    return {"passes": whole.total / one.total, "flops": whole.total, "mb": memory.peak / 1e6}


def stepper(overrides: str, steps: int | None) -> Callable[[], Any]:
    """Takes an outer step of `TASKS` tasks."""
    layer, task = make(overrides, steps)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3, fused=True)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    constant.last_epoch = LATE
    outer = OuterLoop(layer, optimizer, constant, clip=None, capture="false")
    episode = task.sample(TASKS, "train", torch.Generator().manual_seed(0))
    outer.prepare(episode)
    return lambda: outer.step(episode)


def cells(wanted: list[str], inner_steps: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A record of every algorithm and number of inner steps, counted."""
    for overrides in wanted:
        loops = "inner_steps" in config_of(overrides, None)[0].algorithm
        for steps in inner_steps if loops else (None,):
            yield {"algorithm": overrides, "inner_steps": steps, **counted(overrides, steps)}


def take_turns(records: list[dict[str, Any]], turns: int) -> None:
    """Sets the seconds of each record: the median over turns."""
    steps = [stepper(record["algorithm"], record["inner_steps"]) for record in records]
    times: list[list[float]] = [[] for _ in records]
    for step in steps:
        step()  # the first is slower
    for _ in range(turns):
        for step, taken in zip(steps, times, strict=True):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
    for record, taken in zip(records, times, strict=True):
        record["seconds"] = statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one inner step, one turn")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="algorithms whose names start so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [name for name in algorithms() if not asked.only or name.startswith(tuple(asked.only))]
    found = list(cells(wanted, QUICK if asked.quick else COUNTED))
    take_turns([r for r in found if r["inner_steps"] in (None, *TIMED)], 1 if asked.quick else TURNS)
    for r in found:
        steps = "" if r["inner_steps"] is None else f"{r['inner_steps']} steps"
        timed = f"{r['seconds'] * 1e3:8.1f} ms" if "seconds" in r else ""
        print(f"{r['algorithm']:70} {steps:9} {r['passes']:6.1f} passes {r['mb']:7.1f} MB {timed}", flush=True)
    if asked.json is not None:
        write_json(asked.json, {"machine": machine([]), "tasks": TASKS, "cells": found}, indent=1)


if __name__ == "__main__":
    main()
