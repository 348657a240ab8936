"""The measure of over-fitting: support and query scores of training and test tasks."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

from mlframework.base_layers import MLP
from mlframework.evaluation import Interval, OverFitting, TaskSet
from mlframework.inner_loop import SGD
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers import MAML, Exact, LinearKernel, Ridge
from mlframework.tasks import Sinusoid
from mlframework.tasks.fixed_train_tasks import fix_train_tasks

ROOT = Path(__file__).parents[1]


def maml(task):
    torch.manual_seed(0)
    update = partial(SGD, lr=0.05)
    return MAML(
        MLP(task.spec, hidden=[20]), task, update=update, meta_gradient=Exact(), inner_steps=1, test_inner_steps=2
    )


def test_each_cell_is_the_mean_over_the_tasks_of_its_split():
    task = fix_train_tasks(Sinusoid(5, 7), 3, seed=0)
    layer = maml(task)
    measured = OverFitting(tasks=6, seed=4).measure(layer, "test", 3)
    for split in ("train", "test"):
        (episode,) = TaskSet(task, split, tasks=6, seed=4)
        for step in range(4):  # as many as were chosen, though the algorithm's own number is 2
            adapted = last(layer.trajectory(episode.support, step))
            row = f"{split}, {step} steps"
            losses = {}
            for name, part in (("support_loss", episode.support), ("query_loss", episode.query)):
                errors = (layer.predict(adapted, part.x) - part.y).square().mean((1, 2)).detach()
                losses[name] = errors
                found, wanted = measured.columns[name][row], Interval.of(errors)
                assert found.mean == pytest.approx(wanted.mean, rel=1e-5)
                assert found.half_width == pytest.approx(wanted.half_width, rel=1e-4)
            difference = measured.columns["query_minus_support_loss"][row]
            assert difference.mean == pytest.approx(
                float((losses["query_loss"] - losses["support_loss"]).mean()), abs=1e-5
            )
    assert list(measured.columns["query_loss"]) == [f"{s}, {n} steps" for s in ("train", "test") for n in range(4)]


def test_training_tasks_are_the_fixed_ones():
    task = fix_train_tasks(Sinusoid(5, 5), 1, seed=0)
    measured = OverFitting(tasks=10, seed=0).measure(maml(task), "test", 1)
    assert measured.columns["query_loss"]["train, 0 steps"].half_width == pytest.approx(0, abs=1e-6)
    assert measured.columns["query_loss"]["test, 0 steps"].half_width > 0.1


def test_an_algorithm_without_inner_steps_has_one_row_a_split():
    task = Sinusoid(5, 5)
    layer = Ridge(MLP(task.spec, hidden=[20]), task, kernel=LinearKernel())
    measured = OverFitting(tasks=10, seed=0).measure(layer, "test", 0)
    assert list(measured.columns["support_loss"]) == ["train, 0 steps", "test, 0 steps"]


def test_the_page_has_what_the_script_makes_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("over_fitting")
    page = (ROOT / "docs" / "over-fitting.md").read_text(encoding="utf-8")
    for name, text in script.parts(*script.stored()):
        stands = page.split(f"<!-- begin: scripts/over_fitting.py {name} -->\n")[1].split("\n<!-- end -->")[0]
        assert stands == text, f"{name}: run scripts/over_fitting.py"
