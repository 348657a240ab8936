"""Ctrl-C during a training: the step is finished and kept, and goes on from there; twice, it stops at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from mlframework.backend.capture import Capture
from mlframework.runs.run import train_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.training.interrupt import DeferredInterrupt
from mlframework.training.trainer import Trainer

SHORT = [
    "base_layer.hidden=[8]",
    "trainer.steps=5",
    "trainer.meta_batch=4",
    "trainer.validate_every=4",
    "trainer.validation_tasks=3",
    "trainer.checkpoint_every=4",
    "evaluation=none",
    "logger.figures=false",
]


class Interrupted(Sinusoid):
    """Sinusoids during whose third training draw Ctrl-C is pressed, once or more."""

    def __init__(self, k_shot: int = 10, k_query: int = 10, *, presses: int = 1) -> None:
        super().__init__(k_shot, k_query)
        self.presses, self.draws = presses, 0

    def sample(self, num_tasks, split, generator):
        episode = super().sample(num_tasks, split, generator)
        if num_tasks == 4:
            self.draws += 1
            if self.draws == 3:
                for _ in range(self.presses):
                    signal.raise_signal(signal.SIGINT)
        return episode


@pytest.fixture(autouse=True)
def heeding():
    """Whoever runs the tests in the background may have had Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def train(folder: Path, *more: str) -> None:
    overrides = [*SHORT, *more]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, f"run_dir={folder}"])
    train_run(config, RunFolder(folder), overrides=overrides)


def last(folder: Path) -> dict:
    return torch.load(RunFolder(folder).last, weights_only=True)


def test_the_step_at_hand_is_finished_and_kept_and_the_run_goes_on_from_there(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", f"task._target_={__name__}.Interrupted")
    assert last(tmp_path / "stopped")["progress"]["step"] == 3, "no checkpoint is due before the fourth"
    assert "interrupted: stops after this step, or at once if interrupted again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path / "stopped", "resume=true")
    train(tmp_path / "whole")
    stopped, whole = last(tmp_path / "stopped")["meta_layer"], last(tmp_path / "whole")["meta_layer"]
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_pressed_twice_it_stops_where_it_is(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, f"task._target_={__name__}.Interrupted", "+task.presses=2")
    assert last(tmp_path)["progress"]["step"] == 0


def test_pressed_after_the_last_step_nothing_else_is_begun(tmp_path, monkeypatch):
    save = Trainer.save

    def pressed(self, training, progress):
        save(self, training, progress)
        if progress.step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "save", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "trainer.checkpoint_every=9")
    assert last(tmp_path)["progress"]["step"] == 5


def test_a_compiler_that_it_stops_is_not_taken_for_one_that_fails(tmp_path, monkeypatch):
    def stopped(*args):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("the compiler is gone")

    monkeypatch.setattr(Capture, "build", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "outer.capture=true")
    assert last(tmp_path)["progress"]["step"] == 0, "an eager step would not be the one that is taken after all"


def test_nobody_may_be_there_to_read_that_it_stops(monkeypatch):
    def gone(*args):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    with DeferredInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
    assert interrupt.asked


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "another's"])
def test_a_handler_that_is_not_pythons_stays(handler):
    signal.signal(signal.SIGINT, handler)
    with DeferredInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    assert not interrupt.asked


def test_a_thread_beside_the_main_one_changes_nothing():
    seen = []

    def beside():
        with DeferredInterrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
