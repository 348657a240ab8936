"""Peak memory of an outer step by inner steps, checkpoints and chunks: `python benchmarks/inner_loop_memory.py`.

Each cell runs in a process of its own. What is judged is the most bytes of live tensors at any time, which do not
depend on the machine; beside them stands by how much the process grew in RAM. A step that keeps only each inner step's
parameters may take `BAR` times the memory of a single inner step, plus these parameters.

`--json FILE` keeps the result; scripts/performance.py draws docs/performance.md from
results/benchmarks/inner_loop_memory.json.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from counters import PeakMemory
from memory import in_a_process, peak_mb
from scaling import Cell
from solvers import machine
from steps import INNER_LR

from mlframework.files import write_json
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.training.meta_gradient import meta_gradient

#: Times the memory of one inner step that many checkpointed ones may take, beside the parameters that they keep.
BAR = 1.5
#: MB that 4096 tasks may take in chunks of 64.
CHUNKED_LIMIT_MB = 4.0


class Setting(NamedTuple):
    """A cell, and how memory is saved in it.

    Attributes:
        workload: what is learned, and on how many tasks and inner steps.
        checkpoint: whether only each inner step's parameters are kept.
        chunk: tasks at a time; None takes all.
    """

    workload: Cell
    checkpoint: bool = False
    chunk: int | None = None


WAVES = Cell("inner steps", 25, 1, widths=(40, 40))
IMAGES = Cell("inner steps", 4, 1, filters=64)
MANY_WAVES = Cell("tasks", 4096, 1, widths=(40, 40))
STEPS = {WAVES: (1, 50), IMAGES: (1, 10)}
SETTINGS = (
    *(
        Setting(workload._replace(inner_steps=steps), checkpoint)
        for workload, counts in STEPS.items()
        for steps in counts
        for checkpoint in (False, True)
    ),
    Setting(MANY_WAVES),
    Setting(MANY_WAVES, chunk=64),
)


def measure(setting: Setting) -> dict[str, float]:
    """MB of live tensors, MB by which the process grew, seconds of the second step, and MB of the kept parameters."""
    torch.set_num_threads(1)
    tiny = setting.workload._replace(tasks=2, inner_steps=1)
    stepper(setting._replace(workload=tiny, chunk=None))()  # imports what it takes
    step = stepper(setting)
    before = peak_mb()
    step()
    began = time.perf_counter()
    step()
    seconds, grown = time.perf_counter() - began, peak_mb() - before
    with PeakMemory() as memory:
        step()
    return {"mb": memory.peak / 1e6, "mb_process": grown, "seconds": seconds, "stored_mb": stored_mb(setting.workload)}


def stepper(setting: Setting) -> Callable[[], Any]:
    """Takes the meta-gradient of one episode."""
    task, base_layer, episode = setting.workload.make()
    layer = MAML(
        base_layer,
        task,
        update=functools.partial(SGD, lr=INNER_LR),
        meta_gradient=Exact(),
        inner_steps=setting.workload.inner_steps,
        checkpoint_steps=setting.checkpoint,
    )
    return lambda: meta_gradient(layer, episode, chunk=setting.chunk)


def stored_mb(workload: Cell) -> float:
    """MB of every task's parameters after each inner step."""
    parameters = sum(p.numel() for p in workload.make()[1].parameters())
    return workload.tasks * workload.inner_steps * parameters * 4 / 1e6


def record(setting: Setting) -> dict[str, Any]:
    """What was found of a setting, in a process of its own."""
    workload, found = setting.workload, in_a_process(measure, setting)
    named = {"network": workload.network, "tasks": workload.tasks, "inner_steps": workload.inner_steps}
    print(
        f"{workload.network:10} {workload.tasks:5} tasks {workload.inner_steps:3} steps"
        f" {'checkpointed' if setting.checkpoint else '':12} {f'chunks of {setting.chunk}' if setting.chunk else '':12}"
        f" {found['mb']:8.1f} MB of tensors, process {found['mb_process']:6.0f} MB, {found['seconds']:7.3f} s",
        flush=True,
    )
    return {**named, "checkpoint": setting.checkpoint, "chunk": setting.chunk, **found}


def bars(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must hold: MB that were found, and MB that are allowed."""
    found = {(c["network"], c["tasks"], c["inner_steps"], c["checkpoint"], c["chunk"]): c for c in cells}
    held = []
    for workload, counts in STEPS.items():
        one = found[workload.network, workload.tasks, 1, False, None]
        many = found[workload.network, workload.tasks, counts[-1], True, None]
        what = f"{workload.network}, {workload.tasks} tasks, {counts[-1]} checkpointed steps"
        held.append({"what": what, "mb": many["mb"], "allowed": BAR * one["mb"] + many["stored_mb"]})
    chunked = found[MANY_WAVES.network, MANY_WAVES.tasks, 1, False, 64]
    what = f"{MANY_WAVES.network}, {MANY_WAVES.tasks} tasks in chunks of 64"
    return [*held, {"what": what, "mb": chunked["mb"], "allowed": CHUNKED_LIMIT_MB}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = [record(setting) for setting in SETTINGS]
    held = bars(cells)
    for bar in held:
        verdict = "held" if bar["mb"] <= bar["allowed"] else "MISSED"
        print(f"{bar['what']}: {bar['mb']:.1f} MB, at most {bar['allowed']:.1f} MB: {verdict}")
    if asked.json is not None:
        write_json(asked.json, {"machine": machine([]), "cells": cells, "bars": held}, indent=1)


if __name__ == "__main__":
    main()
