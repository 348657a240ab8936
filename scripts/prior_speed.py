"""How long tasks of a prior take to draw, beside a step of the network that learns from them: CPU time on one thread.

`python scripts/prior_speed.py` measures, writes results/priors/speed.json, and draws the table in docs/priors.md.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from prior_runs import machine

from mlframework.files import write_json, write_part
from mlframework.runs import build

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "priors" / "speed.json", ROOT / "docs" / "priors.md"
TASKS, TIMES = 16, 20


def milliseconds(call: Callable[[], object]) -> float:
    """The median of the CPU time of a call."""
    call()
    taken = []
    for _ in range(TIMES):
        start = time.process_time()
        call()
        taken.append(1000 * (time.process_time() - start))
    return statistics.median(taken)


def measured() -> Iterator[dict[str, Any]]:
    """A cell for each generator and for all of them, then one for a step."""
    for names in ("network", "trees", "linear", "gaussian_process", "clusters", None):
        chosen = [] if names is None else [f"task/generator=[{names}]"]
        with initialize_config_module("mlframework.conf", version_base="1.3"):
            config = compose("train", ["experiment=prior_tables", *chosen])
        task, generator = build.build_task(config), torch.Generator().manual_seed(0)
        took = milliseconds(functools.partial(task.sample, TASKS, "train", generator))
        yield {"what": f"draw from {names or 'all'}", "ms": took}
    torch.manual_seed(0)
    layer = build.build_meta_layer(config, task)
    outer = build.build_outer_loop(config, layer)
    episode = task.sample(TASKS, "train", generator)
    outer.prepare(episode)
    yield {"what": "a step", "ms": milliseconds(lambda: outer.step(episode))}


def drawn() -> Iterator[str]:
    """The table of the page."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    yield f"| {found['tasks']} tasks of `experiment=prior_tables` | ms of CPU |"
    yield "| --- | ---: |"
    for cell in found["cells"]:
        yield f"| {cell['what']} | {cell['ms']:.1f} |"
    yield ""
    yield f"{found['machine']}, one thread, torch {found['torch']}, medians of {TIMES}, beside other work."


def main() -> None:
    torch.set_num_threads(1)
    about = {"tasks": TASKS, "machine": machine(), "torch": torch.__version__}
    if "draw" not in sys.argv:
        write_json(RESULTS, {**about, "cells": list(measured())}, indent=1)
    write_part(PAGE, "scripts/prior_speed.py", "\n".join(drawn()))


if __name__ == "__main__":
    main()
