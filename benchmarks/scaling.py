"""How an outer step grows, ours beside the plain loop: `python benchmarks/scaling.py [--quick] [--threads N]`.

Over tasks, inner steps, ways and shots, and the size of the network. A step is the exact meta-gradient over a
meta-batch and Adam's update. In each cell the contenders live in processes of their own and take turns; meta-gradients
are compared before the clock runs, as in outer_step.py. The plain loop goes through the tasks one after another, by
`functional_call` and `autograd.grad`: what a researcher writes by hand, and what ours must never be slower than.

`--json FILE` keeps the result; scripts/performance.py draws docs/performance.md from results/benchmarks/scaling*.json.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import CAPTURED, PLAIN, outer_step
from counters import Operations, PeakMemory
from loops import plain_loop
from solvers import machine
from steps import INNER_LR, Step
from turns import DOUBLE_TOLERANCE, TOLERANCE, difference, first, memory, turn
from workloads import in_double

from mlframework.backend.machine import tune
from mlframework.base_layers import MLP, BaseLayer, Conv4
from mlframework.episode import Episode
from mlframework.files import write_json
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TaskDistribution

OURS = "ours"
#: Ours may take as long as the plain loop, times this.
BAR = 1.05
#: Turns of each contender at most and at least, and seconds of a cell after which there are no more.
MOST_TURNS, LEAST_TURNS, PATIENCE = 15, 3, 20.0
#: Seconds that a first step may take, imports and compilation included.
LIMIT = 180.0
#: Beyond these the plain loop takes minutes, and the graph of unrolled steps minutes to compile.
MOST_PLAIN_TASKS, MOST_CAPTURED_STEPS = 256, 10


class Cell(NamedTuple):
    """What is learned: waves by an MLP, or noise, 28x28 in classes, by the strided Conv4.

    Attributes:
        growth: what grows from cell to cell: tasks, inner steps, ways and shots, or size.
        tasks, inner_steps: of an outer step.
        widths: of the MLP's hidden layers; empty for a Conv4.
        filters: of the Conv4.
        n_way, k_shot: classes, and support examples of each; as many queries.
        double: whether all numbers are float64.
    """

    growth: str
    tasks: int
    inner_steps: int
    widths: tuple[int, ...] = ()
    filters: int = 0
    n_way: int = 5
    k_shot: int = 1
    double: bool = False

    @property
    def network(self) -> str:
        return "MLP " + "-".join(map(str, self.widths)) if self.widths else f"Conv4-{self.filters}"

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.make()[1].parameters())

    @property
    def name(self) -> str:
        kind = "" if self.widths else f" {self.n_way}-way {self.k_shot}-shot"
        return f"{self.network}{kind}, {self.tasks} tasks, {self.inner_steps} steps"

    def make(self) -> tuple[TaskDistribution, BaseLayer, Episode]:
        """The same weights and the same meta-batch in every process."""
        torch.manual_seed(0)
        task: TaskDistribution = Sinusoid() if self.widths else self.images()
        base_layer = MLP(task.spec, hidden=self.widths) if self.widths else Conv4(task.spec, filters=self.filters)
        episode = task.sample(self.tasks, "train", torch.Generator().manual_seed(0))
        return (task, base_layer.double(), in_double(episode)) if self.double else (task, base_layer, episode)

    def images(self) -> TaskDistribution:
        labels = torch.arange(20).repeat(2 * self.k_shot)
        data = ClassIndexed.from_labels(torch.rand(len(labels), 1, 28, 28), labels)
        return ArrayTasks({"train": data}, n_way=self.n_way, k_shot=self.k_shot, k_query=self.k_shot)


WAVES = {"widths": (40, 40)}
CELLS = (
    *(Cell("tasks", tasks, 1, **WAVES) for tasks in (1, 2, 4, 16, 64, 256, 1024, 4096)),
    *(Cell("inner steps", 25, steps, **WAVES) for steps in (1, 2, 5, 10, 20, 50)),
    *(
        Cell("ways and shots", tasks, 1, filters=64, n_way=n_way, k_shot=k_shot)
        for n_way, k_shot in ((5, 1), (5, 5), (20, 1))
        for tasks in (1, 4)
    ),
    *(Cell("size", 25, 1, widths=(width, width)) for width in (40, 128, 512, 1024)),
    *(Cell("size", 4, 1, filters=filters) for filters in (32, 64, 128)),
)
QUICK = (CELLS[0], CELLS[3], CELLS[10], CELLS[14], CELLS[21])
GROWTHS = tuple(dict.fromkeys(cell.growth for cell in CELLS))


def ours(cell: Cell, capture: str) -> Step:
    """As a run takes its steps, with the allocator as it is there; `capture` is `outer.capture`."""
    tune()
    task, base_layer, episode = cell.make()
    rule = functools.partial(SGD, lr=INNER_LR)
    layer = MAML(base_layer, task, update=rule, meta_gradient=Exact(), inner_steps=cell.inner_steps)
    return outer_step(layer, episode, capture=capture)


CONTENDERS: dict[str, Callable[[Cell], Step]] = {
    PLAIN: plain_loop,
    OURS: functools.partial(ours, capture="false"),
    CAPTURED: functools.partial(ours, capture="true"),
}


def takes(name: str, cell: Cell) -> bool:
    """Whether a contender is asked."""
    if name == PLAIN:
        return cell.tasks <= MOST_PLAIN_TASKS
    return name == OURS or (cell.widths == (40, 40) and cell.inner_steps <= MOST_CAPTURED_STEPS)


def live(name: str, cell: Cell, threads: int, connection: Connection) -> None:
    """A contender's process: takes a first step, then times turns as it is asked to."""
    torch.set_num_threads(threads)
    if name != CAPTURED:
        CONTENDERS[name](cell._replace(tasks=1, inner_steps=1))()  # imports what it takes
    step = CONTENDERS[name](cell)
    began = first(step)
    connection.send(began)
    step()
    while connection.recv():
        connection.send(turn(step))
    grown = memory("VmHWM") - began["mb_before"]
    connection.send({"mb_process": grown, **({} if name == CAPTURED else counted(step))})


def counted(step: Step) -> dict[str, float]:
    """Of one step: MB of tensors at their peak, floating-point operations, calls of kernels."""
    with PeakMemory() as memory:
        step()
    with Operations() as operations:
        step()
    return {"mb": memory.peak / 1e6, "flops": operations.total, "calls": operations.calls}


def compare(cell: Cell, threads: int, most_turns: int, names: list[str]) -> list[dict[str, Any]]:
    """A record for each contender: seconds of a step (median over turns), of the first one, memory, operations."""
    records, running = [], []
    truth = None
    described = {**cell._asdict(), "network": cell.network, "parameters": cell.parameters}
    del described["double"]
    for name in names:
        connection, process = start(name, cell, threads)
        record: dict[str, Any] = {**described, "contender": name}
        records.append(record)
        found = answer(connection)
        if isinstance(found, dict):
            truth = found["gradient"] if truth is None else truth
            record.update(first=found["seconds"], difference=difference(found["gradient"], truth))
            found = next(iter(found["warned"]), None)
            if record["difference"] > TOLERANCE:
                record["difference_double"] = off = difference_in_double(name, cell, threads)
                if not off <= DOUBLE_TOLERANCE:
                    found = f"its meta-gradient is {record['difference']:.1e} off, in float64 {off:.1e}"
        if found is None:
            running.append((connection, process, record))
        else:
            record["left_out"] = found
            process.kill()
    take_turns([(connection, record) for connection, _, record in running], most_turns)
    for connection, process, record in running:
        connection.send(False)
        record.update(connection.recv())
        process.join()
    return records


def difference_in_double(name: str, cell: Cell, threads: int) -> float:
    """How far a contender's meta-gradient is from the plain loop's in float64, where no rounding explains it."""
    gradients = []
    for who in (PLAIN, name):
        connection, process = start(who, cell._replace(double=True), threads)
        found = answer(connection)
        process.kill()
        if not isinstance(found, dict):
            return math.nan
        gradients.append(found["gradient"])
    return difference(gradients[1], gradients[0])


def answer(connection: Connection) -> Any:
    """What a process sends of its first step, or why it sends nothing."""
    if not connection.poll(LIMIT):
        return f"no first step in {LIMIT:.0f} s"
    try:
        return connection.recv()
    except EOFError:
        return "its process died"


def start(name: str, cell: Cell, threads: int) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    """A contender's process, and the way to speak with it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=live, args=(name, cell, threads, there), daemon=True)
    process.start()
    there.close()
    return here, process


def take_turns(running: list[tuple[Connection, dict[str, Any]]], most: int) -> None:
    """Sets the seconds of each record: the median over turns."""
    times: list[list[float]] = [[] for _ in running]
    began = time.perf_counter()
    for count in range(most):
        if count >= LEAST_TURNS and time.perf_counter() - began > PATIENCE:
            break
        for taken, (connection, _) in zip(times, running, strict=True):
            connection.send(True)
            taken.append(connection.recv())
    for taken, (_, record) in zip(times, running, strict=True):
        record["seconds"] = statistics.median(taken)


def line(cell: Cell, records: list[dict[str, Any]]) -> str:
    """One cell's times and ratios to the plain loop."""
    found = {r["contender"]: r for r in records}
    plain = found.get(PLAIN, {}).get("seconds")
    cells = []
    for name, r in found.items():
        if "left_out" in r:
            cells.append(f"{name}: {r['left_out']}")
        else:
            ratio = f" ({plain / r['seconds']:.1f}x)" if plain and name != PLAIN else ""
            cells.append(f"{name} {r['seconds'] * 1e3:.3g} ms{ratio}")
    return f"{cell.growth:14} {cell.name:45} " + "; ".join(cells)


def ratios(cells: list[dict[str, Any]]) -> Iterator[tuple[float, str]]:
    """How many times the plain loop's time our eager step takes, and where, of every cell that has both."""
    plain = {key(r): r["seconds"] for r in cells if r["contender"] == PLAIN and "seconds" in r}
    for r in cells:
        if r["contender"] == OURS and "seconds" in r and key(r) in plain:
            name = f"{r['network']}, {r['n_way']}-way {r['k_shot']}-shot, {r['tasks']} tasks, {r['inner_steps']} steps"
            yield r["seconds"] / plain[key(r)], name


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a record's cell from others."""
    return tuple(record[name] for name in ("network", "n_way", "k_shot", "tasks", "inner_steps"))


def gemm_rate() -> float:
    """Floating-point operations a second of a large product in float32: the best of ten."""
    n, best = 1024, math.inf
    a, b = torch.randn(n, n), torch.randn(n, n)
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five cells, few turns, nothing captured")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for every contender")
    parser.add_argument("--growth", choices=GROWTHS, action="append", help="only this one; may be given again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    wanted = [c for c in (QUICK if asked.quick else CELLS) if asked.growth is None or c.growth in asked.growth]
    result: dict[str, Any] = {"machine": machine([]), "threads": asked.threads, "gemm": gemm_rate(), "cells": []}
    for cell in wanted:
        names = [name for name in CONTENDERS if takes(name, cell) and not (asked.quick and name == CAPTURED)]
        records = compare(cell, asked.threads, LEAST_TURNS if asked.quick else MOST_TURNS, names)
        print(line(cell, records), flush=True)
        result["cells"] += records
    worst, where = max(ratios(result["cells"]), default=(math.nan, "nothing was compared"))
    verdict = "held" if worst <= BAR else "MISSED"
    print(f"ours / plain loop, the worst: {worst:.2f} ({where}); at most {BAR}: {verdict}")
    if asked.json is not None:
        write_json(asked.json, result, indent=1)


if __name__ == "__main__":
    main()
