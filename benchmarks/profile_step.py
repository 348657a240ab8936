"""What an outer step of ours spends its time on: `python benchmarks/profile_step.py W2-strided-4x5 [--captured]`.

The shares of the time in torch's own profiler, by kind of work; workloads are those of outer_step.py. A captured step
is compiled with its loops named, which takes a minute or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from contenders import OURS, ours
from rich.console import Console
from rich.table import Table
from solvers import machine
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS

from mlframework.files import write_json

STEPS = 3

#: Kinds of work, by what the names of kernels hold; the first that fits.
KINDS = {
    "products of matrices": ("mm", "matmul", "linear"),
    "convolutions": ("convolution",),
    "batch norm": ("batch_norm",),
    "fused loops": ("cpp_fused", "CompiledFxGraph"),
    "copies and zeros": ("copy_", "fill_", "clone", "aten::cat", "aten::stack", "zero_"),
    "elementwise and sums": (
        *("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::sum", "aten::mean", "aten::pow"),
        *("aten::gelu", "aten::relu", "aten::clamp", "aten::threshold", "aten::where", "aten::exp", "aten::rsqrt"),
        *("softmax", "max_pool", "aten::square", "aten::maximum", "aten::addcmul", "aten::gather", "aten::erf"),
    ),
}


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "views and python")


def shares(name: str, *, captured: bool) -> dict[str, Any]:
    """Seconds of a step, and the share of each kind of work in them."""
    if captured:
        torch._inductor.config.cpp.enable_kernel_profile = True
    workload = next(w for w in WORKLOADS if w.name == name)
    step = ours(workload, capture="true" if captured else "false")
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / STEPS
    total = sum(spent.values())
    return {
        "name": name,
        "contender": "captured" if captured else OURS,
        "seconds": total,
        "shares": {kind: seconds / total for kind, seconds in sorted(spent.items(), key=lambda item: -item[1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[w.name for w in WORKLOADS], metavar="NAME")
    parser.add_argument("--captured", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = [shares(name, captured=asked.captured) for name in asked.names]
    for cell in cells:
        table = Table(title=f"{cell['name']}, {cell['contender']}: {cell['seconds'] * 1e3:.3g} ms")
        for kind, share in cell["shares"].items():
            table.add_row(kind, f"{share:.0%}")
        Console().print(table)
    if asked.json is not None:
        write_json(asked.json, {"machine": machine([]), "cells": cells})


if __name__ == "__main__":
    main()
