"""The error of the meta-gradient under `outer.precision=bf16`: `python benchmarks/precision.py`."""

from __future__ import annotations

import statistics
from pathlib import Path

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
TEXT = ("task=text_lists", "task.length=16", "base_layer=transformer")
CASES = {
    "maml": ("algorithm=maml", *IMAGES),
    "prototypes": ("algorithm=prototypes", *IMAGES),
    "svm": ("algorithm=svm", *IMAGES),
    "ridge": ("algorithm=ridge", *IMAGES),
    "fomaml, text": ("algorithm=fomaml", *TEXT),
}
SEEDS = 3


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
    for precision in ("float32", "bf16"):
        layer.multiply_in(precision)
        meta_gradient(layer, episode)
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
    exact, near = found
    return float((near - exact).norm() / exact.norm())


def main() -> None:
    found = {name: errors(overrides) for name, overrides in CASES.items()}
    write_json(ROOT / "results" / "precision.json", {**machine([]), **git_state(), "cases": found})
    lines = [f"| case | median of {SEEDS} seeds | largest |", "| --- | --- | --- |"]
    lines += [f"| {n} | {100 * statistics.median(each):.2f} % | {100 * max(each):.2f} % |" for n, each in found.items()]
    write_part(ROOT / "docs" / "scale.md", "precision", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
