"""Broken modules and tasks: each ends in one line that names it, before anything is trained or written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import SHORT, call

import mlframework
from mlframework.cli import train
from mlframework.episode import Examples
from mlframework.runs import run

SMALL = (*SHORT, "run_dir=run", "evaluation=none")
INDUCTIVE = ["algorithm.batch_norm=inductive"]
SUPPORT = ["algorithm.batch_norm=support"]

#: A base layer of `broken_parts`, what else is typed, and the answer.
MODULES = [
    ("detached", [], "base_layer.head.1 (Detach): its output is detached"),
    ("too_wide", [], "base_layer.head (Linear): returns (2, 2) for two inputs, and must return (2, 1)"),
    ("two_outputs", [], "base_layer: returns a tuple, and must return one tensor of predictions"),
    ("with_noise", [], "base_layer.features.2 (Noise): gives two outputs for one input in evaluation mode"),
    ("with_memory", [], "base_layer.features.2 (Remembers): gives two outputs for one input in evaluation mode"),
    ("with_fixed", [], "base_layer.features.2 (Fixed): gives other outputs once its weights are saved and loaded"),
    (
        "trains_only",
        [],
        "base_layer.features.2 (TrainsOnly): fails in evaluation mode: RuntimeError: no statis",
    ),
    (
        "refuses_rows",
        [],
        "base_layer.features.2 (RefusesPairs): fails in training mode: RuntimeError: shape ",
    ),
    ("drops_mask", SUPPORT, "base_layer.features.2.norm (BatchStatistics): other queries move a query's prediction"),
    ("drops_mask", ["task=broken"], "base_layer.features.2.norm (BatchStatistics): rows of padding move the predict"),
    ("centred", [], "base_layer.features.2 (Centre): an example's output depends on the examples beside it, unannou"),
    ("centred", INDUCTIVE, "base_layer.features.2 (Centre): an example's output depends on the examples beside it"),
    ("with_extra", [], "algorithm (MAML): fails to be saved and loaded: UnpicklingError: Weights only load failed"),
    ("Plain", ["algorithm=ridge"], "Ridge works on features: base_layer must be a BaseLayer(features, head)"),
]

#: A task of `broken_parts`, and the answer.
TASKS = [
    ("LabelsFromOne", "task (LabelsFromOne), train split query: class ids are not all in 0...1"),
    ("Images", "task (Images), train split support: x is (1, 4, 1, 16, 8), spec.x_shape is (1, 8, 8)"),
    ("NotANumber", "task (NotANumber), train split query: x is not finite"),
    ("EmptySupport", "task (EmptySupport), train split support: nothing counts in one of the tasks"),
    ("NoValidation", "task (NoValidation), validation split: fails to sample 1 tasks: KeyError: 'validation' ("),
    ("OwnDice", "task (OwnDice), train split: two generators of one seed give two episodes: draw all random numbers f"),
    ("AlwaysTwo", "task (AlwaysTwo), train split: support.x is (2, 4, 1, 8, 8), and must start with the 1 tasks asked"),
    ("FloatLabels", "task (FloatLabels), train split support: y is torch.float32, and must be torch.int64 in a "),
    ("Dictionary", "task (Dictionary): sample must return an Episode of Examples, whose x, y and mask a"),
    ("NarrowTargets", "task (NarrowTargets), train split query: y is (1, 10), and must be (1, 10, 1) in a regression"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder with configs for the parts that are broken."""
    for group, names in {"base_layer": {name for name, _, _ in MODULES} | {"late", "tied"}, "task": ()}.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        for name in names:
            partial = f"_target_: broken_parts.{name}\n"
            (tmp_path / "conf" / group / f"broken_{name}.yaml").write_text(partial)
    (tmp_path / "conf" / "task" / "broken.yaml").write_text("_target_: broken_parts.RaggedSinusoid\n")
    for name, _ in TASKS:
        (tmp_path / "conf" / "task" / f"broken_{name}.yaml").write_text(f"_target_: broken_parts.{name}\n")
    return tmp_path


def typed(folder: Path, *overrides: str) -> list[str]:
    return ["--config-dir", str(folder / "conf"), *SMALL, *overrides]


def assert_refused(said, line, folder):
    assert said.err.startswith(line), said.err
    assert (said.exit_code, said.err.count("\n"), said.out) == (2, 1, "")
    assert [path.name for path in folder.iterdir()] == ["conf"]


@pytest.mark.parametrize(("name", "overrides", "line"), MODULES, ids=lambda value: str(value)[:25])
def test_a_broken_module_is_one_line_before_anything_is_written(folder, name, overrides, line):
    said = call(train.main, *typed(folder, f"base_layer=broken_{name}", *overrides), folder=folder)
    assert_refused(said, line, folder)


@pytest.mark.parametrize(("name", "line"), TASKS, ids=lambda value: str(value)[:25])
def test_a_broken_task_is_one_line_before_anything_is_written(folder, name, line):
    said = call(train.main, *typed(folder, f"task=broken_{name}"), folder=folder)
    assert_refused(said, line, folder)


def test_the_tables_are_long_enough():
    assert len(MODULES) >= 3 and len(TASKS) >= 3


@pytest.mark.parametrize("name", ["late", "tied", "Plain"])
def test_a_layer_made_in_the_first_call_a_tied_one_and_a_plain_module_are_trained_saved_and_loaded(folder, name):
    assert call(train.main, *typed(folder, f"base_layer=broken_{name}"), folder=folder).exit_code == 0
    x = torch.linspace(-1, 1, 10).view(1, 10, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        one, other = (mlframework.load("run", weights=weights, device="cpu") for weights in ("best", "last"))
    support = Examples(x, x.sin(), torch.ones(1, 10))
    torch.testing.assert_close(one.adapt(support).predict(x[0]), other.adapt(support).predict(x[0]))


def test_a_mask_that_is_dropped_does_no_harm_where_no_policy_needs_it(folder):
    said = call(train.main, *typed(folder, "base_layer=broken_drops_mask"), folder=folder)
    assert said.exit_code == 0, said.err


@pytest.mark.parametrize(
    "overrides", [[], ["algorithm=reptile"], ["task=digits", "base_layer.norm=batch", "algorithm=prototypes"]]
)
def test_what_is_tried_leaves_the_training_as_it_was(tmp_path, monkeypatch, overrides):
    def only_prepared(training, make_meta_layer):
        training.outer.prepare(training.task.sample(2, "train", torch.Generator().manual_seed(0)))
        return {training_metric(training): None}

    def training_metric(training):
        return "query_loss" if training.task.spec.kind == "regression" else "query_accuracy"

    small = (*SHORT, "evaluation=none", "trainer.validate_every=1", *overrides)
    assert call(train.main, *small, "run_dir=tried", folder=tmp_path).exit_code == 0
    monkeypatch.setattr(run, "try_out", only_prepared)
    assert call(train.main, *small, "run_dir=untried", folder=tmp_path).exit_code == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("tried", "untried")
    )
    assert all(torch.equal(value, other["meta_layer"][name]) for name, value in one["meta_layer"].items())
    assert all(torch.equal(one["generators"][name], other["generators"][name]) for name in ("tasks", "torch"))
