"""Ten `kill -9` at random moments after the first checkpoint: `python benchmarks/kill_and_resume.py [--only NAME ...]`.

Each case is trained once without a stop, and once by processes that are killed ten times. Every process starts with an
empty cache folder, so that only the run folder tells it how to go on. At the end the last checkpoints (parameters,
optimizer, schedule, generators), the best weights and the TensorBoard curves must be equal, bit for bit.

`--json FILE` keeps the table, each case as it ends; results/kill_and_resume.json has the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from solvers import machine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten

from mlframework.files import write_json
from mlframework.runs.git_state import git_state
from mlframework.runs.run_folder import RunFolder

COMMON = (
    "seed=0",
    "device=cpu",
    "threads=1",
    "evaluation=none",
    "logger.figures=false",
    "trainer.meta_batch=4",
    "trainer.checkpoint_every=5",
    "trainer.validation_tasks=4",
    "trainer.log_every=1",
)
IMAGES = ("task=digits", "task.k_shot=1", "task.k_query=2", "base_layer=conv4", "base_layer.filters=16")
TEXT = ("task=text_lists", "base_layer=gru", "base_layer.width=16", "task.length=16")
CASES: Mapping[str, tuple[str, ...]] = {
    "maml": ("algorithm=maml", *IMAGES, "trainer.steps=400"),
    "meta_networks": ("algorithm=meta_networks", *IMAGES, "algorithm.size=16", "trainer.steps=400"),
    "maml_plus_plus": (
        "algorithm=maml_plus_plus",
        *IMAGES,
        "algorithm.inner_steps=3",
        "algorithm.meta_gradient.first_order_steps=150",
        "algorithm.step_weights.steps=250",
        "trainer.steps=400",
    ),
    "prototypes": ("algorithm=prototypes", *IMAGES, "trainer.steps=400"),
    "text_gru": ("algorithm=fomaml", *TEXT, "trainer.steps=300"),
    "captured": ("algorithm=maml", "base_layer.hidden=[8]", "outer.capture=true", "trainer.steps=1000"),
}
KILLS = 10

#: The largest share of the steps after which a process is killed, and the longest delay after the checkpoint, seconds.
LATEST, DELAY = 0.7, 0.05

#: A curve of the clock.
CLOCK = "train/tasks_per_second"


@contextmanager
def training(folder: Path, overrides: tuple[str, ...], *more: str) -> Iterator[subprocess.Popen[str]]:
    """A process that trains with an empty cache folder, which is removed afterwards."""
    cache = tempfile.mkdtemp(prefix="cache-")
    command = [sys.executable, "-m", "mlframework.cli.train", *COMMON, *overrides, f"run_dir={folder}", *more]
    every = ["trainer.validate_every=100"]
    environment = {**os.environ, "MLFRAMEWORK_CACHE": cache}
    try:
        with subprocess.Popen([*command, *every], env=environment, stderr=subprocess.PIPE, text=True) as process:
            yield process
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def train(folder: Path, overrides: tuple[str, ...], *more: str) -> None:
    """One process to its end."""
    with training(folder, overrides, *more) as process:
        _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(overrides)} ended with {process.returncode}:\n{said}")


def train_and_kill(folder: Path, overrides: tuple[str, ...], *, after: int, seconds: float) -> int:
    """Kills a process some seconds after it has written a checkpoint beyond a step; returns the step of its last."""
    resume = f"resume={'true' if RunFolder(folder).holds_run else 'false'}"
    with training(folder, overrides, resume) as process:
        while process.poll() is None and steps_done(folder) <= after:
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        _, said = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"{' '.join(overrides)} came to its end ({process.returncode}) before it was killed:\n{said}")
    return steps_done(folder)


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(RunFolder(folder).last, weights_only=True)


def steps_done(folder: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    return state_of(folder)["progress"]["step"] if RunFolder(folder).last.exists() else 0


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each curve, without that of the clock."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != CLOCK
    }


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two nests hold the same bits."""
    (found, structure), (expected, other) = tree_flatten(ours), tree_flatten(theirs)
    return structure == other and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, expected, strict=True)
    )


def compared(killed: Path, whole: Path) -> dict[str, bool]:
    """Whether what two runs left is equal, part by part."""
    ours, theirs = state_of(killed), state_of(whole)
    for state in (ours, theirs):
        del state["progress"]["seconds"]
    best = [safetensors.torch.load_file(RunFolder(folder).best) for folder in (killed, whole)]
    parts = {name: equal(ours[name], theirs[name]) for name in theirs}
    return {**parts, "best weights": equal(*best), "curves": curves(killed) == curves(whole)}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Trains a case twice, and compares."""
    whole, killed, chance = folder / "whole", folder / "killed", random.Random(name)
    train(whole, CASES[name])
    seconds, steps = RunFolder(whole).read_result()["seconds"], RunFolder(whole).config().trainer.steps
    reached = [0]
    for step in sorted(chance.sample(range(int(LATEST * steps)), KILLS)):
        delay = chance.uniform(0, DELAY)
        reached.append(train_and_kill(killed, CASES[name], after=max(step, reached[-1]), seconds=delay))
    train(killed, CASES[name], "resume=true")
    same = compared(killed, whole)
    return {"case": name, "overrides": CASES[name], "seconds": seconds, "killed_at": reached[1:], "equal": same}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a case."""
    lines = ["| case | killed after the checkpoint of step | equal | not equal |", "| --- | --- | --- | --- |"]
    for row in rows:
        yes, no = ([part for part, same in row["equal"].items() if same is wanted] for wanted in (True, False))
        lines.append(
            f"| {row['case']} | {', '.join(map(str, row['killed_at']))} | {', '.join(yes)} | {', '.join(no)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="a file to keep the cases in, beside those that it holds already")
    given = parser.parse_args()
    kept = json.loads(given.json.read_text())["cases"] if given.json and given.json.exists() else []
    rows = {row["case"]: row for row in kept}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = {**measure(name, Path(folder)), **git_state()}
        print(table([rows[name]]), flush=True)
        if given.json:
            write_json(given.json, {"machine": machine([]), "cases": [rows[case] for case in CASES if case in rows]})
    if not all(all(rows[name]["equal"].values()) for name in given.only):
        raise SystemExit("a run that was killed ends otherwise than one that was not")


if __name__ == "__main__":
    main()
