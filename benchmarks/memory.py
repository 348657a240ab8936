"""Peak memory and time of one outer step through a transformer: `python benchmarks/memory.py [--quick] [--json FILE]`.

One task of text: 8 rows of 64 bytes to adapt to, 8 to be judged by. Each cell runs in a process of its own; its memory
is the most that the process ever held in RAM beyond what it held before, with the network built, one forward pass done
and everything imported. A cell that would need more than `--limit` GB, judged by one with fewer inner steps, is left
out.

Without `--quick` the result is written to results/benchmarks/memory.json, and with it the table and the plot of
docs/text.md; `--draw` writes these two from the JSON that is there.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from solvers import machine

from mlframework.base_layers import Transformer
from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.files import write_json, write_part
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, FirstOrder, Truncated
from mlframework.meta_layers.gradient_descent.cavia import CAVIA, Shift
from mlframework.meta_layers.gradient_descent.lora import LoRA
from mlframework.tasks import TaskDistribution
from mlframework.training.meta_gradient import meta_gradient

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "results" / "benchmarks" / "memory.json"
PAGE, PLOT = ROOT / "docs" / "text.md", ROOT / "docs" / "memory.png"

STEPS = (1, 5, 10)
ROWS, LENGTH, VOCABULARY = 8, 64, 257


class Size(NamedTuple):
    """A transformer."""

    name: str
    width: int
    depth: int
    heads: int


SIZES = (Size("0.2 M", 64, 4, 4), Size("1 M", 128, 5, 4), Size("10 M", 320, 8, 8))

SMALLEST = Size("smallest", 8, 2, 2)

WAYS = ("exact", "checkpointed", "truncated to 1 step", "first order", "LoRA only", "context only")


class RandomText(TaskDistribution):
    """Tokens drawn at random: time and memory do not depend on their values."""

    spec = TaskSpec("sequence", (LENGTH,), VOCABULARY, ragged=False)

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        tokens = torch.randint(VOCABULARY, (num_tasks, 2 * ROWS, LENGTH + 1), generator=generator)
        examples = Examples(tokens[..., :-1], tokens[..., 1:], torch.ones(num_tasks, 2 * ROWS, LENGTH))
        return Episode(examples.rows(slice(ROWS)), examples.rows(slice(ROWS, None)))


def meta_layer(way: str, size: Size, steps: int) -> MAML:
    """An algorithm by the name of what is measured."""
    task = RandomText()
    network = Transformer(task.spec, width=size.width, depth=size.depth, heads=size.heads)
    settings: dict[str, Any] = {"update": functools.partial(SGD, lr=0.01), "inner_steps": steps}
    if way == "LoRA only":
        return LoRA(network, task, layers=".", rank=4, meta_gradient=Exact(), **settings)
    if way == "context only":
        first = next(name for name, _ in network.named_modules() if name.count(".") == 1)
        return CAVIA(
            network, task, modulates=first, modulation=Shift, context_size=64, meta_gradient=Exact(), **settings
        )
    gradient = {"first order": FirstOrder(), "truncated to 1 step": Truncated(1)}.get(way, Exact())
    return MAML(network, task, meta_gradient=gradient, checkpoint_steps=way == "checkpointed", **settings)


def measure(way: str, size: Size, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of an outer step (the median), and the most memory in MB beyond what the process held before."""
    torch.set_num_threads(1)
    episode = RandomText().sample(1, "train", torch.Generator().manual_seed(0))
    meta_gradient(meta_layer(way, SMALLEST, 1), episode)  # imports what it takes
    layer = meta_layer(way, size, steps)
    with torch.no_grad():
        layer.predict(dict(layer.initial(episode.support)), episode.query.x)
    before = peak_mb()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        meta_gradient(layer, episode)
        times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in layer.parameters())
    return {"seconds": statistics.median(times), "mb": peak_mb() - before, "parameters": parameters}


def peak_mb() -> float:
    """The most that this process has ever held in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Calls a function in a new process, which has no memory of others."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def cells(sizes: Sequence[Size], steps: Sequence[int], repeats: int, limit_gb: float) -> Iterator[dict[str, Any]]:
    """A record of every cell, or of why it is left out."""
    for size in sizes:
        for way in WAYS:
            last: dict[str, Any] | None = None
            for count in steps:
                expected = last["mb"] * count / last["steps"] if last else 0.0
                if expected > 1024 * limit_gb:
                    yield {"size": size.name, "way": way, "steps": count, "expected_mb": expected}
                    continue
                found = in_a_process(measure, way, size, count, repeats)
                last = {"size": size.name, "way": way, "steps": count, **found}
                print(
                    f"{size.name:6} {way:20} {count:3} steps {found['mb']:8.0f} MB {found['seconds']:8.2f} s",
                    flush=True,
                )
                yield last


def report(result: dict[str, Any]) -> str:
    """The table: a row per size and way, MB and seconds at each number of inner steps."""
    steps = result["steps"]
    found = {(cell["size"], cell["way"], cell["steps"]): cell for cell in result["cells"]}
    sizes = list(dict.fromkeys(cell["size"] for cell in result["cells"]))
    lines = [
        ", ".join(f"{name} {value}" if name != "processor" else value for name, value in result["machine"].items())
        + ".",
        "",
        "| parameters | | " + " | ".join(f"{s} inner steps: MB, s" for s in steps) + " |",
        "| --- " * (2 + len(steps)) + "|",
    ]
    for size in sizes:
        for way in WAYS:
            row = [found[size, way, s] for s in steps]
            shown = [
                f"{c['mb']:.0f}, {c['seconds']:.2f}" if "mb" in c else f"above {c['expected_mb']:.0f}" for c in row
            ]
            lines.append(f"| {size} | {way} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Peak memory against inner steps, a panel per size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    sizes = list(dict.fromkeys(cell["size"] for cell in result["cells"]))
    figure = Figure(figsize=(4 * len(sizes) + 2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for index, size in enumerate(sizes):
        axes = figure.add_subplot(1, len(sizes), index + 1)
        for way in WAYS:
            row = [c for c in result["cells"] if (c["size"], c["way"]) == (size, way) and "mb" in c]
            axes.plot([c["steps"] for c in row], [c["mb"] for c in row], marker="o", label=way)
        axes.set(title=f"{size} parameters", xlabel="inner steps", yscale="log")
        axes.set_xticks(result["steps"])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        if index == 0:
            axes.set_ylabel("peak memory, MB")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def write(result: dict[str, Any]) -> None:
    """The table and the plot of the page."""
    write_part(PAGE, "benchmarks/memory.py", report(result))
    plot(result, PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest model, one repeat")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--draw", action="store_true", help="only write the table and the plot")
    parser.add_argument("--limit", type=float, default=16.0, help="GB that a cell may need")
    options = parser.parse_args()
    if options.draw:
        write(json.loads(RESULT.read_text()))
        return
    sizes, repeats = (SIZES[:1], 1) if options.quick else (SIZES, 3)
    found = list(cells(sizes, STEPS, repeats, options.limit))
    torch.set_num_threads(1)
    result = {"machine": machine([]), "steps": list(STEPS), "cells": found}
    print(report(result))
    path = options.json or (None if options.quick else RESULT)
    if path is not None:
        write_json(path, result)
    if path == RESULT and PAGE.exists():
        write(result)


if __name__ == "__main__":
    main()
