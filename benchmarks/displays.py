"""What each display costs: seconds per validation in which it draws. Writes JSON, and the table of docs/tensorboard.md.

python benchmarks/displays.py --out results/benchmarks/displays.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from mlframework.base_layers import MLP, Conv4
from mlframework.evaluation import (
    ByInnerStep,
    Confusion,
    ContactSheet,
    Display,
    Fits,
    InnerSteps,
    Learned,
    Predictions,
    SupportInfluence,
    Validated,
)
from mlframework.evaluation.interval import Interval
from mlframework.files import write_json, write_part
from mlframework.inner_loop import LayerStepRates
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Glyphs, Sinusoid, TaskDistribution
from mlframework.training import TensorBoardLogger

PAGE = Path(__file__).parents[1] / "docs" / "tensorboard.md"
ANY = {"by_inner_step": ByInnerStep(), "learned": Learned(), "inner_steps": InnerSteps()}
ANY |= {"support_influence": SupportInfluence()}
TASKS: dict[str, tuple[TaskDistribution, dict[str, Display]]] = {
    "sinusoid, MLP": (Sinusoid(k_shot=10, k_query=10), {**ANY, "fits": Fits(), "predictions": Predictions()}),
    "glyphs 5-way 5-shot, Conv4": (
        Glyphs(n_way=5, k_shot=5, k_query=5),
        {**ANY, "contact_sheet": ContactSheet(), "confusion": Confusion(), "predictions": Predictions()},
    ),
}


def algorithm(task: TaskDistribution) -> MAML:
    image = len(task.spec.x_shape) == 3
    network = Conv4(task.spec, filters=64) if image else MLP(task.spec, hidden=[40, 40])
    update = partial(LayerStepRates, lr=0.01, steps=5)
    return MAML(network, task, update=update, meta_gradient=Exact(), inner_steps=5)


def seconds(display: Display, layer: MAML, task: TaskDistribution, logger: TensorBoardLogger, repeats: int) -> float:
    """The median time of a display; the first call, which imports matplotlib, does not count."""
    episode = task.sample(4, "validation", torch.Generator().manual_seed(0))
    steps = [Interval(1.0, 0.1, 100)] * 6
    validated = Validated(layer, episode, {"query_loss": steps, "query_accuracy": steps}, 1)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        display.show(validated, logger)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(Path(folder), start=0)
        for name, (task, displays) in TASKS.items():
            torch.manual_seed(0)
            layer = algorithm(task)
            found[name] = {key: seconds(each, layer, task, logger, arguments.repeats) for key, each in displays.items()}
        logger.close()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"command": "python benchmarks/displays.py", "commit": commit, "machine": platform.processor() or "x86"}
    content = {**about, "torch": torch.__version__, "threads": 1, "repeats": arguments.repeats, "seconds": found}
    print(json.dumps(content, indent=2))
    if arguments.out:
        write_json(arguments.out, content)
        write_part(PAGE, "costs", table(content))


def table(content: dict[str, object]) -> str:
    found = content["seconds"]
    assert isinstance(found, dict)
    names = list(dict.fromkeys(name for column in found.values() for name in column))
    lines = [f"| seconds each time | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for name in names:
        cells = [f"{column[name]:.2f}" if name in column else "" for column in found.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    how = f"`{content['command']}` at commit {str(content['commit'])[:7]}, medians of {content['repeats']}, one thread"
    return "\n".join([*lines, "", f"{how}, torch {content['torch']}. The task's yaml says which are on."])


if __name__ == "__main__":
    main()
