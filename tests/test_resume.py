"""A run that is killed and resumed ends as one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlframework.errors import InvalidValue, UserError
from mlframework.run import train_run
from mlframework.run_folder import RunFolder

KILLS = 10
OVERRIDES = [
    "algorithm=meta_sgd",
    "base_layer.hidden=[8]",
    "trainer.steps=120",
    "trainer.meta_batch=4",
    "trainer.checkpoint_every=3",
    "trainer.validate_every=20",
    "trainer.validation_tasks=4",
    "trainer.log_every=1",
    "evaluation=none",
    "logger.figures=false",
]


def train(folder: Path, *more: str) -> None:
    """One run in this process, as the command would make it."""
    torch.set_num_threads(1)
    overrides = [*OVERRIDES, *more]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, f"run_dir={folder}"])
    train_run(config, RunFolder(folder), overrides=overrides)


def learned(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert state["progress"]["step"] == 120
    return state["meta_layer"]


def test_a_run_killed_at_ten_random_moments_ends_bit_for_bit_like_one_never_stopped(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.perf_counter()
    train(whole)
    duration = time.perf_counter() - began
    # A server that has torch imported already: each process then starts, and dies, in the midst of its work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlframework.run", "hydra", "torch.utils.tensorboard"])
    moments = random.Random(0)
    reached = []
    for _ in range(KILLS):
        resume = "true" if RunFolder(killed).holds_run else "false"
        process = context.Process(target=train, args=(killed, f"resume={resume}"))
        process.start()
        process.join(0.3 + moments.uniform(0, duration / 2))
        process.kill()
        process.join()
        last = killed / "checkpoints" / "last.pt"
        reached.append(torch.load(last, weights_only=True)["progress"]["step"] if last.exists() else 0)
    assert reached == sorted(reached)
    train(killed, f"resume={'true' if RunFolder(killed).holds_run else 'false'}")
    expected, found = learned(whole), learned(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (
        json.loads((whole / "result.json").read_text())["best"]
        == json.loads((killed / "result.json").read_text())["best"]
    )
    assert not list(killed.rglob("*.part")), "a killed process may leave a part, the next one clears it"


def test_a_resumed_run_leaves_one_point_per_step(tmp_path):
    train(tmp_path, "trainer.steps=10")
    time.sleep(1.1)  # TensorBoard reads a folder's files in the order of their names, which hold the second
    train(tmp_path, "trainer.steps=20", "resume=true")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/query_loss")] == list(range(1, 21))


def test_a_resumed_run_goes_on_with_what_it_was_started_with(tmp_path):
    train(tmp_path, "trainer.steps=5")
    with pytest.raises(InvalidValue, match=r"optimizer.lr=0.5: this run was started with 0.003"):
        train(tmp_path, "resume=true", "optimizer.lr=0.5")


def test_a_resumed_run_keeps_the_record_of_how_it_was_started(tmp_path):
    train(tmp_path, "trainer.steps=2")
    before = json.loads((tmp_path / "result.json").read_text())
    folder = RunFolder(tmp_path)
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [f"run_dir={tmp_path}", "resume=true"])
    train_run(config, folder, overrides=[f"run_dir={tmp_path}", "resume=true"], choices={"algorithm": "another"})
    assert json.loads((tmp_path / "result.json").read_text()) == before


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(tmp_path, "trainer.steps=2")
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(UserError, match="holds a run already: resume=true continues it"):
        train(tmp_path, "trainer.steps=2")
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UserError, match="resume=true: there is no run in"):
        train(tmp_path / "nowhere", "resume=true")


def test_a_folder_in_use_is_left_alone(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(UserError, match="another process is using this run folder"):
        train(tmp_path)
