"""Memory and time of adapting to 2,000 images, all at once and in parts: `python benchmarks/large_support.py`.

Each cell runs in a process of its own, on one thread; its memory is the most that the process ever held in RAM beyond
what it held before, with the network built and the data drawn. The result is written to
results/benchmarks/large_support.json, and with it the table of docs/pretrained.md; `--draw` writes the table alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from solvers import processor

from mlframework.base_layers import Conv4
from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.files import write_json, write_part
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, LinearKernel, MetaLayer, Prototypes, Ridge
from mlframework.runs.git_state import git_state
from mlframework.tasks import TaskDistribution
from mlframework.training.meta_gradient import meta_gradient

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "results" / "benchmarks" / "large_support.json", ROOT / "docs" / "pretrained.md"

IMAGES, QUERIES, PART, CLASSES = 2000, 20, 50, 10


class RandomImages(TaskDistribution):
    """Images drawn at random: time and memory do not depend on their values."""

    spec = TaskSpec("classification", (1, 28, 28), CLASSES, ragged=False)

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        def examples(count: int) -> Examples:
            x = torch.rand(num_tasks, count, *self.spec.x_shape, generator=generator)
            return Examples(x, (torch.arange(count) % CLASSES).repeat(num_tasks, 1), torch.ones(num_tasks, count))

        return Episode(examples(IMAGES), examples(QUERIES))


def maml(base_layer: Conv4, task: TaskDistribution) -> MetaLayer:
    return MAML(base_layer, task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2)


def ridge(base_layer: Conv4, task: TaskDistribution) -> MetaLayer:
    return Ridge(base_layer, task, kernel=LinearKernel(constant=1.0))


ALGORITHMS: dict[str, Callable[[Conv4, TaskDistribution], MetaLayer]] = {
    "maml, 2 exact steps": maml,
    "ridge": ridge,
    "prototypes": Prototypes,
}


def adapt(layer: MetaLayer, episode: Episode) -> torch.Tensor:
    with torch.no_grad():
        return layer.eval().predict(layer.adapt(episode.support), episode.query.x)


def train(layer: MetaLayer, episode: Episode) -> torch.Tensor:
    meta_gradient(layer.train(), episode)
    return torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])


WORK = {"adapt": adapt, "meta-gradient": train}


def cell(algorithm: str, work: str, part: int | None, results: Any) -> None:
    """Measures once, after a warm-up on few images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = RandomImages()
    layer = ALGORITHMS[algorithm](Conv4(task.spec, norm="group"), task)
    episode = task.sample(1, "train", torch.Generator().manual_seed(0))
    WORK[work](layer, episode._replace(support=episode.support.rows(slice(CLASSES))))
    layer.take_support_by(part)
    before, began = peak(), time.process_time()
    found = WORK[work](layer, episode)
    results.put({"bytes": peak() - before, "seconds": time.process_time() - began, "found": found.tolist()})


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured() -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    for algorithm in ALGORITHMS:
        for work in WORK:
            cells = []
            for part in (None, PART):
                results = context.Queue()
                process = context.Process(target=cell, args=(algorithm, work, part, results))
                process.start()
                cells.append(results.get())
                process.join()
            whole, parts = (torch.tensor(each.pop("found"), dtype=torch.float64) for each in cells)
            difference = float((parts - whole).norm() / whole.norm())
            yield {"algorithm": algorithm, "work": work, "whole": cells[0], "parts": cells[1], "difference": difference}


def drawn() -> Iterator[str]:
    """The table of the page."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    at_once = f"MB, all at once | MB, {found['part']} at a time | seconds, all at once | seconds, in parts"
    yield f"| {found['images']} images | {at_once} | difference |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for row in found["rows"]:
        memory = [f"{row[name]['bytes'] / 1e6:,.0f}" for name in ("whole", "parts")]
        seconds = [f"{row[name]['seconds']:.1f}" for name in ("whole", "parts")]
        numbers = " | ".join([*memory, *seconds])
        yield f"| {row['algorithm']}: {row['work']} | {numbers} | {row['difference']:.0e} |"
    yield ""
    yield (
        f"`python benchmarks/large_support.py`, commit {found['commit'][:7]}, one thread of an {found['machine']}: the "
        "most memory beyond that of network and data, CPU seconds, and the norm of the difference of the results "
        "(predictions, or the meta-gradient) relative to theirs."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        about = {"images": IMAGES, "part": PART, "machine": processor(), "commit": git_state()["commit"]}
        write_json(RESULT, {**about, "rows": list(measured())})
    write_part(PAGE, "benchmarks/large_support.py", "\n".join(drawn()))


if __name__ == "__main__":
    main()
