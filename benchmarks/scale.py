"""What a step costs in 1, 2 and 3 processes, and a model of it for more: `python benchmarks/scale.py [--steps N]`.

Each rank takes its share of a meta-batch, with one thread. Seconds are those of the processor, which another program on
the machine does not lengthen, beside those of the clock. The model's numbers come from the run of one process and from
all-reduces of two sizes in two processes; what it says of two processes stands beside the measurement.

results/scale.json keeps the numbers, and docs/scale.md their tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from solvers import machine

from mlframework import processes
from mlframework.files import write_json, write_part
from mlframework.runs.git_state import git_state
from mlframework.runs.run import set_up
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks.on_features import on_features

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlframework.runs.run", "hydra", "torch.distributed"])
ROOT = Path(__file__).parent.parent
COUNTS = (1, 2, 3)
META_BATCH = 12
#: Tasks of the smaller meta-batch from which, in one process, the part of a step follows that no process saves.
FEW = 3
COMMON = ("device=cpu", "threads=1", "seed=0", f"trainer.meta_batch={META_BATCH}")
IMAGES = ("task=digits", "task.k_shot=1", "task.k_query=15", "base_layer=conv4", "base_layer.filters=32")
CASES = {
    "maml": ("algorithm=maml", *IMAGES, "algorithm.inner_steps=5"),
    "prototypes": ("algorithm=prototypes", *IMAGES),
}
#: Numbers in the all-reduces from which latency and speed follow.
SIZES = (1_000, 4_000_000)
#: The assumptions for more processes: seconds until a message arrives, bytes in a second, and tasks for each process.
LATENCY, SPEED, TASKS_EACH = 20e-6, 10e9, 8


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class Timed:
    """A function whose calls are timed by the clock and by the processor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.times = function, list[tuple[float, float]]()

    def __call__(self, *args: Any) -> Any:
        before = clocks()
        found = self.function(*args)
        self.times.append(tuple(b - a for a, b in zip(before, clocks(), strict=True)))  # type: ignore[arg-type]
        return found


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    """Median milliseconds, without the first calls."""
    wall, processor = zip(*times[3:], strict=True)
    return {"clock": 1e3 * statistics.median(wall), "processor": 1e3 * statistics.median(processor)}


def take_steps(folder: Path, steps: int) -> None:
    """Steps of each case; rank 0 writes the times of all ranks."""
    found = {}
    for name, overrides in CASES.items():
        with initialize_config_module("mlframework.conf", version_base="1.3"):
            config = compose("train", [*COMMON, *overrides, f"run_dir={folder}"])
        torch.manual_seed(0)
        training, trainer = set_up(config, RunFolder(folder)), instantiate(config.trainer)
        outer, task = training.outer, on_features(training.task, training.meta_layer.base_layer)
        training.outer.prepare(task.sample(2, "train", torch.Generator().manual_seed(0)))
        outer.all_reduce, step = Timed(outer.all_reduce), Timed(trainer.outer_step)  # type: ignore[assignment]
        for number in range(steps):
            step(training, number)
        small = Timed(instantiate(config.trainer, meta_batch=FEW).outer_step)
        for number in range(steps if processes.count() == 1 else 0):
            small(training, number)
        draw = Timed(task.sample)
        for _ in range(steps):
            draw(META_BATCH, "train", training.generator)
        times = {"step": medians(step.times), "draw": medians(draw.times)}
        if processes.count() == 1:
            times["small step"] = medians(small.times)
        else:
            times["all-reduce"] = medians(outer.all_reduce.times)  # type: ignore[attr-defined]
        numbers = sum(p.numel() for p in outer.learned.values())
        found[name] = {"parameters": numbers, "ranks": processes.gathered(times)}
    sums = {}
    for size in SIZES if processes.count() > 1 else ():
        call = Timed(processes.summed)
        for _ in range(steps):
            call(torch.ones(size))
        sums[size] = medians(call.times)
    if processes.leads():
        write_json(folder / f"{processes.count()}.json", {"cases": found, "sums": sums})


def as_rank(rank: int, count: int, port: int, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with processes.one_speaks(), processes.joined():
        take_steps(folder, steps)


def in_ranks(count: int, folder: Path, steps: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=as_rank, args=(r, count, port, folder, steps)) for r in range(count)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    if any(each.exitcode for each in ranks):
        raise SystemExit(f"{count} processes ended with {[each.exitcode for each in ranks]}")
    return json.loads((folder / f"{count}.json").read_text())


def measure(steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = {count: in_ranks(count, Path(folder), steps) for count in COUNTS}
    return {**machine([]), **git_state(), "load": os.getloadavg()[0], "steps": steps, "counts": found}


def link(sums: Mapping[str, Mapping[str, float]], by: str) -> tuple[float, float]:
    """Milliseconds of an empty all-reduce of two processes, and for each number in it."""
    (small, few), (large, many) = ((int(size), time[by]) for size, time in sums.items())
    each = (many - few) / (large - small)
    return max(few - small * each, 0), max(each, 0)


def parts(case: Mapping[str, Any], by: str) -> tuple[float, float, float]:
    """Milliseconds for drawing a task, for its meta-gradient, and for a step without tasks, from one process."""
    (times,) = case["ranks"]
    draw = times["draw"][by] / META_BATCH
    gradient = (times["step"][by] - times["small step"][by]) / (META_BATCH - FEW) - draw
    return draw, gradient, times["small step"][by] - FEW * (draw + gradient)


def predicted(case: Mapping[str, Any], sums: Mapping[str, Any], count: int, by: str) -> float:
    """The model: every process draws all tasks and takes the gradient of its own, then one all-reduce."""
    (draw, gradient, fixed), (empty, each) = parts(case, by), link(sums, by)
    return fixed + META_BATCH * draw + ceil(META_BATCH / count) * gradient + empty + each * case["parameters"]


def measured_table(found: Mapping[str, Any], by: str) -> str:
    lines = [
        "| case | parameters | 1 process: draw, step | 2: step, all-reduce | model of 2 | 3: step, all-reduce |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    counts = found["counts"]
    for name, case in counts["1"]["cases"].items():
        (one,) = case["ranks"]
        more = []
        for count in ("2", "3"):
            ranks = counts[count]["cases"][name]["ranks"]
            slowest = max(ranks, key=lambda times: times["step"][by])
            more.append(f"{slowest['step'][by]:.1f}, {slowest['all-reduce'][by]:.1f}")
        model = predicted(case, counts["2"]["sums"], 2, by)
        first = f"{one['draw'][by]:.1f}, {one['step'][by]:.1f}"
        lines.append(f"| {name} | {case['parameters']:,} | {first} | {more[0]} | {model:.1f} | {more[1]} |")
    return "\n".join(lines)


def model_table(found: Mapping[str, Any], by: str) -> str:
    """What the model says of many processes, with the assumptions at the top of this file."""
    lines = [
        "| case | processes | tasks | draw, ms | gradient | all-reduce | step | tasks/s of one, times |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in found["counts"]["1"]["cases"].items():
        draw, gradient, fixed = parts(case, by)
        alone = fixed + TASKS_EACH * (draw + gradient)
        for count in (8, 64, 512):
            tasks = TASKS_EACH * count
            ring = 2e3 * ((count - 1) * LATENCY + (count - 1) / count * 4 * case["parameters"] / SPEED)
            step = fixed + tasks * draw + TASKS_EACH * gradient + ring
            cells = [f"{tasks * draw:.1f}", f"{fixed + TASKS_EACH * gradient:.1f}", f"{ring:.2f}", f"{step:.1f}"]
            lines.append(f"| {name} | {count} | {tasks} | {' | '.join(cells)} | {count * alone / step:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draw", action="store_true", help="draws the tables of results/scale.json anew")
    given, file, page = parser.parse_args(), ROOT / "results" / "scale.json", ROOT / "docs" / "scale.md"
    if not given.draw:
        write_json(file, measure(given.steps))
    found = json.loads(file.read_text())
    write_part(page, "measured", measured_table(found, "processor"))
    write_part(page, "clock", measured_table(found, "clock"))
    write_part(page, "model", model_table(found, "processor"))
    print(
        measured_table(found, "clock"), measured_table(found, "processor"), model_table(found, "processor"), sep="\n\n"
    )


if __name__ == "__main__":
    main()
