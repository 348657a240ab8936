"""Time from `mlframework-train` to the first outer step: `python benchmarks/startup.py [--runs N] [--json FILE] [...]`.

Every run is a process of its own, and its clock starts before python does. What is reported are medians of: the import
of torch, what the imports of a training take beyond that, and the end of the first outer step, with the config checked
and every split tried out. What is typed beyond the two options goes to the command, as in `task=glyphs`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from solvers import processor

from mlframework.files import write_json

START = "STARTUP_BEGAN"

#: A process notes a moment by name, on a line of its own that nothing else prints.
NOTE = f"""
import os, sys, time
def note(name):
    print("startup", name, time.time() - float(os.environ["{START}"]), flush=True)
"""

#: What a training imports, one after the other.
IMPORTS = f"""{NOTE}
note("python")
import torch
note("torch")
import mlframework.cli.train
import mlframework.runs.run
note("mlframework")
"""

#: The command as its console script runs it, until its first step is done. It imports the trainer itself, only later.
FIRST_STEP = f"""{NOTE}
from mlframework.cli.train import main
from mlframework.training.trainer import Trainer
step = Trainer.outer_step
def first(*args):
    step(*args)
    note("first outer step")
    os._exit(0)
Trainer.outer_step = first
main()
"""


def moments(script: str, *typed: str) -> dict[str, float]:
    """What a new process notes, in seconds since it was started."""
    with tempfile.TemporaryDirectory() as folder:
        run = [f"run_dir={folder}/run"] if script is FIRST_STEP else []
        done = subprocess.run(
            [sys.executable, "-c", script, *run, *typed],
            env={**os.environ, START: str(time.time())},
            capture_output=True,
            text=True,
        )
    lines = [line.split(" ") for line in done.stdout.splitlines() if line.startswith("startup ")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr)
    return {" ".join(words[1:-1]): float(words[-1]) for words in lines}


def measure(runs: int, typed: Sequence[str]) -> dict[str, float]:
    """The medians in seconds; imports and whole starts take turns."""
    found: dict[str, list[float]] = {"import torch": [], "imports beyond torch": [], "first outer step": []}
    for script in (IMPORTS, FIRST_STEP):
        moments(script, *typed)  # reads the files from the disk, and writes what python compiles
    for _ in range(runs):
        imports = moments(IMPORTS)
        found["import torch"].append(imports["torch"] - imports["python"])
        found["imports beyond torch"].append(imports["mlframework"] - imports["torch"])
        found["first outer step"].append(moments(FIRST_STEP, *typed)["first outer step"])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="processes of each kind")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options, typed = parser.parse_known_args()
    found = measure(options.runs, typed)
    table = Table(title=" ".join(["mlframework-train", *typed]))
    for column in ("", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.2f}")
    Console().print(table)
    if options.json:
        record = {"processor": processor(), "torch": torch.__version__, "typed": typed, "runs": options.runs, **found}
        write_json(options.json, record)


if __name__ == "__main__":
    main()
