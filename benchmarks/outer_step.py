"""An outer step of meta-learning, ours beside others': `python benchmarks/outer_step.py [--quick] [--json FILE]`.

A step takes a meta-batch to its meta-gradient, and Adam along it. Each contender lives in a process of its own, on as
many cores as `--threads`, and they take turns, so that a drifting machine slows all alike; times are medians over
turns. Before the clock runs, every contender's meta-gradient is compared, as a whole, with the plain loop's in float64;
one that differs by more than rounding is named and not timed (but for learn2learn's support vector machine, whose
solver is inexact: by how much is told). Ours is what a run does, `OuterLoop.step`: metrics, the norm and the check that
all is finite included; others do the gradient and Adam alone. Their networks are written in torch's own layers.
`captured` is ours compiled.

Workloads: W1 waves by an MLP 40-40; W2 5-way 1-shot on 28x28 by Conv4-64, strided with one query a class and pooled
with fifteen; W3 5-way on 84x84x3 by Conv4-32, pooled, 25 queries; W4 text of 64 tokens by transformers, five rows to
adapt to and five to be judged by; W5 heads on the features of the strided Conv4-64, 5-way 5-shot, 75 queries: only the
features are learned. A name such as W1-sinusoid-25x5 tells tasks and inner steps. Data are noise: what is timed does
not depend on what is learned.

Columns: the ratio of others' time to a contender's; the fraction of the rate at which the machine multiplies float32
matrices, which takes turns with the contenders, by the operations of the plain loop's step; seconds of the first step
(captured: with an empty cache, and from a full one in a new process); MB by which the peak of memory grew since before
the first step, the same for the turns alone, and the whole peak.

What is not installed is named and left out: `pip install -e '.[bench]'` brings higher, TorchOpt and JAX;

    pip install --no-deps parallel-metalearn==0.5.6    # or PARALLEL_METALEARN=folder of the unpacked wheel
    pip install --no-deps qpth==0.0.18                 # which learn2learn's support vector machine takes

learn2learn 0.2.0 does not build on today's Python; the algorithms of its source distribution need no building:

    pip download --no-deps --no-build-isolation --no-binary :all: learn2learn==0.2.0   # or from pypi.org by hand
    tar xzf learn2learn-0.2.0.tar.gz
    LEARN2LEARN=learn2learn-0.2.0 python benchmarks/outer_step.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, JAX, LEARN2LEARN, METALEARN, PLAIN
from rich.console import Console
from rich.table import Table
from solvers import machine
from turns import compare
from workloads import QUICK, WORKLOADS, Workload

from mlframework.files import write_json

ROUNDS, QUICK_ROUNDS = 15, 5
#: Whose time is divided by a contender's, with the heading.
RATIOS = {PLAIN: "plain loop / it", LEARN2LEARN: "learn2learn / it", METALEARN: "metalearn / it", JAX: "JAX / it"}
PEERS = ("higher", "torchopt", "parallel-metalearn", "jax", "qpth")


def show(records: list[dict[str, Any]]) -> Table:
    """A row for each contender of a workload that was timed."""
    timed = {r["contender"]: r for r in records if "seconds" in r}
    rate = next((f", {r['gemm_gflops']:.0f} GFLOP/s of GEMM" for r in timed.values() if "gemm_gflops" in r), "")
    order = ", first order" if records[0]["first_order"] else ", second order" if records[0]["inner_steps"] else ""
    others = {name: heading for name, heading in RATIOS.items() if name in timed}
    headings = ("ms a step", *others.values(), "of GEMM", "first step, s", "MB", "MB, turns", "MB, whole")
    table = Table(title=f"{records[0]['workload']}{order}{rate}")
    table.add_column("contender", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, r in timed.items():
        ratios = (f"{timed[other]['seconds'] / r['seconds']:.2f}x" for other in others)
        fraction = f"{r['fraction']:.1%}" if "fraction" in r else ""
        began = f"{r['first_cold']:.1f}, {r['first_warm']:.1f}" if "first_cold" in r else f"{r['first']:.2f}"
        megabytes = (f"{r[key]:.0f}" if key in r else "" for key in ("mb", "mb_steps", "mb_process"))
        table.add_row(name, f"{r['seconds'] * 1e3:.2f}", *ratios, fraction, began, *megabytes)
    return table


def remarks(records: list[dict[str, Any]]) -> Iterator[str]:
    """Who was left out, and what is to be said of the others."""
    reasons: dict[str, list[str]] = {}
    for r in records:
        if "left_out" in r:
            reasons.setdefault(r["left_out"], []).append(r["contender"])
        elif "note" in r:
            yield f"{r['contender']}: {r['note']}"
    for reason, names in reasons.items():
        yield f"left out: {', '.join(names)}: {reason}"


def versions() -> list[str]:
    """The peers that are installed as distributions."""
    found = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return [name for name in PEERS if name in found]


def workloads(asked: argparse.Namespace) -> list[Workload]:
    """Those that were asked for."""
    every = WORKLOADS if asked.long or asked.only else tuple(w for w in WORKLOADS if not w.long)
    chosen = [w for w in (QUICK if asked.quick else every) if not asked.only or w.name.startswith(tuple(asked.only))]
    if asked.only and not asked.long:  # a prefix does not mean the long ones; a whole name does
        chosen = [w for w in chosen if not w.long or w.name in asked.only]
    if asked.first_order:
        chosen = [w._replace(first_order=True) for w in chosen if w.head is None]
    return [w._replace(device=asked.device) for w in chosen]


def contenders(asked: argparse.Namespace) -> list[str]:
    """Those that were asked for, and the plain loop, which all are compared with."""
    wanted = [name.strip().lower() for name in (asked.contenders or ",".join(CONTENDERS)).split(",")]
    return [name for name in CONTENDERS if name == PLAIN or name.lower().startswith(tuple(wanted))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four workloads, fewer turns")
    parser.add_argument("--long", action="store_true", help="those too that take most of a minute a step")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="workloads whose names start so, as in W2 W4-text-1M")
    parser.add_argument("--contenders", metavar="A,B", help="whose names start so; the plain loop is always there")
    parser.add_argument("--first-order", action="store_true", help="inner gradients as constants; without W5")
    parser.add_argument("--device", default="cpu", help="where to learn; on a GPU, MB are those of its tensors")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for every contender")
    parser.add_argument("--rounds", type=int, help="turns of each contender, at most")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for anybody's first step, imports included")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes, whole after every workload")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    result: dict[str, Any] = {
        "machine": machine(versions()),
        "threads": asked.threads,
        "device": torch.cuda.get_device_name(asked.device) if asked.device.startswith("cuda") else asked.device,
        "order": "first" if asked.first_order else "second",
        "cells": [],
    }
    rounds = asked.rounds or (QUICK_ROUNDS if asked.quick else ROUNDS)
    console = Console(width=max(Console().width, 150))
    for workload in workloads(asked):
        records = compare(workload, contenders(asked), threads=asked.threads, rounds=rounds, limit=asked.limit)
        console.print(show(records))
        for remark in remarks(records):
            console.print(remark, markup=False, highlight=False)
        result["cells"] += records
        if asked.json is not None:
            write_json(asked.json, result)


if __name__ == "__main__":
    main()
