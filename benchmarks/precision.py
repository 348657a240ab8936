"""What `outer.precision=bf16` costs: `python benchmarks/precision.py`.

The error of the meta-gradient, and the test accuracy of networks trained in it beside networks trained in float32.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from solvers import machine

from mlframework.files import write_json, write_part
from mlframework.runs.git_state import git_state
from mlframework.runs.run import set_up
from mlframework.runs.run_folder import RunFolder
from mlframework.training.meta_gradient import meta_gradient

ROOT = Path(__file__).parent.parent
IMAGES = ("task=digits", "task.k_shot=1", "task.k_query=5", "base_layer=mlp")
CONV4 = ("task=glyphs", "task.k_shot=1", "task.k_query=5", "base_layer=conv4")
TEXT = ("task=text_lists", "task.length=16", "base_layer=transformer")
CASES = {
    "maml": ("algorithm=maml", *IMAGES),
    "prototypes": ("algorithm=prototypes", *IMAGES),
    "svm": ("algorithm=svm", *IMAGES),
    "ridge": ("algorithm=ridge", *IMAGES),
    "fomaml, text": ("algorithm=fomaml", *TEXT),
    "prototypes, Conv4": ("algorithm=prototypes", *CONV4),
    "anil, Conv4": ("algorithm=anil", *CONV4),
    "maml, Conv4": ("algorithm=maml", *CONV4),
    "maml, Conv4, group norm": ("algorithm=maml", *CONV4, "base_layer.norm=group"),
}
SEEDS = 3
PRECISIONS = "float32", "bf16"

#: What is trained in both, and how.
TRAINED = "prototypes, Conv4", "maml, Conv4"
BUDGET = (
    *("trainer.steps=200", "trainer.validate_every=50", "trainer.validation_tasks=200", "evaluation.tasks=500"),
    *("evaluation/baseline=[]", "logger.figures=false", "outer.capture=false", "threads=1", "device=cpu"),
)


def errors(overrides: tuple[str, ...]) -> list[float]:
    """The error of each seed."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, "device=cpu", "threads=1", "run_dir=/nowhere"])
    return [error(config, seed) for seed in range(SEEDS)]


def error(config: DictConfig, seed: int) -> float:
    """The norm of the difference of the two meta-gradients of an episode, over that in float32."""
    config.seed = seed
    torch.manual_seed(seed)
    training = set_up(config, RunFolder("/nowhere"))
    layer, episode = training.meta_layer.train(), training.task.sample(8, "train", training.generator)
    found = []
    for precision in PRECISIONS:
        layer.multiply_in(precision)
        meta_gradient(layer, episode)
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
    exact, near = found
    return float((near - exact).norm() / exact.norm())


def accuracies(overrides: tuple[str, ...]) -> dict[str, list[float]]:
    """The accuracy on test tasks of a training with each seed, in each precision."""
    return {
        precision: [accuracy((*overrides, f"outer.precision={precision}", f"seed={seed}")) for seed in range(SEEDS)]
        for precision in PRECISIONS
    }


def accuracy(overrides: tuple[str, ...]) -> float:
    """The accuracy on test tasks after a training of its own process, at the steps that validation tasks choose."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mlframework.cli.train", *overrides, *BUDGET, "run_dir=run"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        result = json.loads(Path(folder, "run", "result.json").read_text(encoding="utf-8"))
    row = result["evaluation"]["rows"][0]
    return row["metrics"]["query_accuracy"][row["steps"].index(row["chosen"])]["mean"]


def main() -> None:
    found = {name: errors(overrides) for name, overrides in CASES.items()}
    trained = {name: accuracies(CASES[name]) for name in TRAINED}
    about = {**machine([]), **git_state()}
    write_json(ROOT / "results" / "precision.json", {**about, "cases": found, "trained": trained, "budget": BUDGET})
    lines = [f"| case | median of {SEEDS} seeds | largest |", "| --- | --- | --- |"]
    lines += [f"| {n} | {100 * statistics.median(each):.2f} % | {100 * max(each):.2f} % |" for n, each in found.items()]
    lines += ["", "| accuracy of each seed, on test tasks | trained in float32 | in bfloat16 |", "| --- | --- | --- |"]
    for name, each in trained.items():
        shown = (", ".join(f"{value:.3f}" for value in each[precision]) for precision in PRECISIONS)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    write_part(ROOT / "docs" / "scale.md", "precision", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
