"""Captured and eager steps compared: `python benchmarks/captured.py [--only NAME ...] [--json FILE]`.

Each algorithm is trained for 200 outer steps on small tasks; at every step the meta-gradient is found both ways from
the same state, and the largest relative difference of the whole is kept; where that is above 1e-4, it is done once more
in float64, in which what is rounding all but vanishes. An algorithm that cannot be captured is listed with the reason.
Each has a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import mlframework.conf
import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table
from solvers import machine
from workloads import in_double

from mlframework.backend.algorithm import Gradients, eager_gradients
from mlframework.backend.capture import Capture
from mlframework.errors import IncompatibleKind
from mlframework.files import as_json, write_json
from mlframework.runs import build

STEPS, META_BATCH = 200, 4
#: Above this a difference is looked at in float64.
ROUNDING = 1e-4
#: Small tasks, in the order in which an algorithm is tried on them.
TASKS = ("task=sinusoid", "task=digits base_layer=mlp task.n_way=2 task.k_query=3", "task=text_lists base_layer=gru")
ALGORITHMS = sorted(path.stem for path in (Path(mlframework.conf.__path__[0]) / "algorithm").glob("*.yaml"))


def compare(algorithm: str, double: bool = False) -> dict[str, Any]:
    """An algorithm's record, of steps in float32 or float64."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for overrides in TASKS:
        with initialize_config_module("mlframework.conf", version_base="1.3"):
            config = compose("train", [f"algorithm={algorithm}", *overrides.split()])
        task = build.build_task(config)
        try:
            layer = build.build_meta_layer(config, task)
        except IncompatibleKind:
            continue
        layer = layer.double() if double else layer
        return {"algorithm": algorithm, "task": overrides.split()[0], **differences(config, task, layer, double)}
    return {"algorithm": algorithm, "refused": "takes none of the tasks"}


def differences(config: Any, task: Any, layer: Any, double: bool) -> dict[str, Any]:
    outer, capture = build.build_outer_loop(config, layer), Capture(layer, "true")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mlframework.backend.capture")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for step in range(STEPS):
        episode = task.sample(META_BATCH, "train", generator)
        episode = in_double(episode) if double else episode
        if step == 0:
            outer.prepare(episode)
            layer.train()
        captured = capture(episode)
        if not all(capture.decided.values()):
            return {"refused": lines[-1].removeprefix("capture: eager steps instead: ")}
        worst = max(worst, difference(captured, eager_gradients(layer, episode)))
        outer.step(episode)
    return {"way": "in regions" if capture.regions.regions else "one graph", "difference": worst, "said": lines[-1]}


def in_process(*args: Any) -> dict[str, Any]:
    """`compare`, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(compare, args)


def difference(found: Gradients, expected: Gradients) -> float:
    """Relative, of the whole meta-gradient."""
    truth, other = (torch.cat([grad.flatten() for grad in g.by_name.values()]) for g in (expected, found))
    return ((other - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def report(records: list[dict[str, Any]]) -> Table:
    table = Table("algorithm", "task", "captured as", f"largest difference in {STEPS} steps")
    for r in records:
        if "refused" in r:
            table.add_row(r["algorithm"], r.get("task", ""), f"not: {r['refused']}")
        else:
            double = f" ({r['difference_double']:.1e} in float64)" if "difference_double" in r else ""
            table.add_row(r["algorithm"], r["task"], r["way"], f"{r['difference']:.1e}{double}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    records = []
    for algorithm in options.only:
        records.append(record := in_process(algorithm))
        if record.get("difference", 0.0) > ROUNDING:
            record["difference_double"] = in_process(algorithm, True).get("difference")
        print(as_json(records[-1]), flush=True)
        if options.json is not None:
            write_json(options.json, {"machine": machine([]), "steps": STEPS, "cells": records})
    Console().print(report(records))


if __name__ == "__main__":
    main()
