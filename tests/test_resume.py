"""A run that is killed and resumed ends as one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from mlframework.base_layers import MLP
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue, UserError
from mlframework.runs import run
from mlframework.runs.run import train_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.training.checkpoint import Progress
from mlframework.training.trainer import Trainer

KILLS, STEPS = 20, 900
OVERRIDES = [
    "algorithm=meta_sgd",
    "base_layer.hidden=[8]",
    f"trainer.steps={STEPS}",
    "trainer.meta_batch=4",
    "trainer.checkpoint_every=3",
    "trainer.validate_every=100",
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


def train_noting_start(folder: Path, note: Path) -> None:
    """Trains or resumes, and writes the step from which it goes on."""
    original = run.start

    def noting(*args: Any) -> Progress:
        progress = original(*args)
        note.write_text(str(progress.step))
        return progress

    run.start = noting
    train(folder, f"resume={'true' if RunFolder(folder).holds_run else 'false'}")


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def steps_done(folder: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    return state_of(folder)["progress"]["step"] if RunFolder(folder).last.exists() else 0


def wait_for_checkpoint(folder: Path, process: Any, after: int) -> None:
    """Returns once a process has written a checkpoint beyond a step."""
    while steps_done(folder) <= after:
        assert process.is_alive(), f"ended with {process.exitcode} before a checkpoint beyond step {after}"
        time.sleep(0.002)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each curve, but for those of the clock."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "train/tasks_per_second"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_for_bit_like_one_never_stopped(tmp_path):
    whole, killed, note = tmp_path / "whole", tmp_path / "killed", tmp_path / "started"
    train(whole)
    # A server that has torch imported already: each process then starts, and dies, in the midst of its work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlframework.runs.run", "hydra", "torch.utils.tensorboard"])
    moments, started, reached = random.Random(0), [], [0]
    for _ in range(KILLS):
        process = context.Process(target=train_noting_start, args=(killed, note))
        process.start()
        wait_for_checkpoint(killed, process, reached[-1])
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the process came to its end before it was killed"
        started.append(int(note.read_text()))
        reached.append(steps_done(killed))
    assert started == reached[:-1], "a process does not go on where the last one was killed"
    assert sorted(set(reached)) == reached and reached[1] > 0, "a process was killed before its first checkpoint"
    train(killed, "resume=true")
    expected, found = state_of(whole), state_of(killed)
    assert expected["progress"]["step"] == STEPS
    for part in ("meta_layer", "optimizer", "generators"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert curves(killed) == curves(whole)
    assert (
        json.loads((whole / "result.json").read_text())["best"]
        == json.loads((killed / "result.json").read_text())["best"]
    )
    assert not list(killed.rglob("*.part")), "a killed process may leave a part, the next one clears it"


def test_curves_are_on_disk_before_the_checkpoint_of_their_step(tmp_path, monkeypatch):
    write, seen = RecordWriter.write, {}

    def slowly(writer, data):
        time.sleep(0.01)
        write(writer, data)

    def reading(trainer, training, progress):
        seen[progress.step] = len(curves(tmp_path).get("train/query_loss", []))

    monkeypatch.setattr(RecordWriter, "write", slowly)
    monkeypatch.setattr(Trainer, "save", reading)
    train(tmp_path, "trainer.steps=9")
    assert seen == {step: step for step in (0, 3, 6, 9)}


class Breaking(Sinusoid):
    """Sinusoids that cannot be drawn at the tenth step of a training, as long as a file is there."""

    def __init__(self, file: str, k_shot: int = 10, k_query: int = 10) -> None:
        super().__init__(k_shot, k_query)
        self.file, self.draws = Path(file), 0

    def sample(self, num_tasks, split, generator):
        self.draws += split == "train" and num_tasks == 4
        if self.draws == 10 and self.file.exists():
            raise OSError("the disk is gone")
        return super().sample(num_tasks, split, generator)


def dropping(spec: TaskSpec, hidden: Sequence[int], norm: str) -> MLP:
    """A network that draws from torch's own generator at every step."""
    network = MLP(spec, hidden=hidden, norm=norm)
    network.features.append(torch.nn.Dropout(0.3))
    return network


def test_a_run_that_broke_off_goes_on_as_one_that_did_not(tmp_path):
    """Adam's moments, a rate that falls, dropout, and a best validation that comes before the break."""
    file = tmp_path / "broken"
    typed = [f"task._target_={__name__}.Breaking", f"+task.file={file}", f"base_layer._target_={__name__}.dropping"]
    typed += ["trainer.steps=16", "trainer.validate_every=2", "optimizer.lr=0.2", "schedule=cosine", "seed=1"]
    train(tmp_path / "whole", *typed)
    file.touch()
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "run", *typed)
    file.unlink()
    train(tmp_path / "run", *typed, "resume=true")
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "run")
    )
    assert all(torch.equal(value, resumed["meta_layer"][name]) for name, value in whole["meta_layer"].items())
    whole["progress"].pop("seconds"), resumed["progress"].pop("seconds")
    assert resumed["progress"] == whole["progress"] and whole["progress"]["best_step"] < 10
    assert all(torch.equal(whole["generators"][name], resumed["generators"][name]) for name in ("tasks", "torch"))


def test_a_resumed_run_draws_the_random_numbers_of_its_regularisers_as_one_that_did_not_stop(tmp_path):
    regularised = ("algorithm=maml", "algorithm.adapts=head", "trainer.validate_every=3", "train_tasks=5")
    parts = "regulariser=[information_penalty,inner_dropout,random_key,task_mixup]"
    train(tmp_path / "whole", *regularised, parts, "trainer.steps=6", "schedule=constant")
    train(tmp_path / "halves", *regularised, parts, "trainer.steps=3", "schedule=constant")
    train(tmp_path / "halves", *regularised, parts, "trainer.steps=6", "schedule=constant", "resume=true")
    whole, halves = (state_of(tmp_path / name)["meta_layer"] for name in ("whole", "halves"))
    assert any("log_deviations" in name for name in whole)
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())


def test_a_resumed_run_leaves_one_point_per_step(tmp_path):
    train(tmp_path, "trainer.steps=10", "schedule=constant")
    train(tmp_path, "trainer.steps=20", "schedule=constant", "resume=true")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/query_loss")] == list(range(1, 21))


@pytest.fixture
def started_run(tmp_path):
    """A run of five steps, as a command with less to say would start it."""
    train(tmp_path, "trainer.steps=5")
    return tmp_path


def test_a_resumed_run_goes_on_with_what_it_was_started_with(tmp_path):
    train(tmp_path, "trainer.steps=5")
    with pytest.raises(InvalidValue, match=r"optimizer.lr=0.5: this run was started with 0.003"):
        train(tmp_path, "trainer.steps=5", "resume=true", "optimizer.lr=0.5")


def go_on(folder, *typed):
    """Resumes a run by a command that names nothing but the changes."""
    overrides = [f"run_dir={folder}", "resume=true", *typed]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", overrides)
    train_run(config, RunFolder(folder), overrides=overrides)


def recorded(folder):
    names = ("config.yaml", "overrides.yaml", "choices.json", "resumed.json", "result.json")
    return {name: (folder / name).read_text() for name in names if (folder / name).exists()}


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("algorithm/update=adam", "this run was started with learned_rates; resume=true cannot change it"),
        ("algorithm.update.lr=0.3", "this run was started with 0.01; resume=true cannot change it"),
        ("+algorithm.update.momentum=0.3", "this run was started with none; resume=true cannot change it"),
        (
            "experiment=text_lists",
            "does not go with the overrides of this run (Could not override 'base_layer.hidden'.)",
        ),
        ("schedule=constant", "this run was started with cosine; resume=true cannot change it"),
        ("trainer.meta_batch=8", "this run was started with 4; resume=true cannot change it"),
        ("trainer.validation_tasks=5", "this run was started with 4; resume=true cannot change it"),
        ("trainer.steps=8", "would change schedule.T_max from 5 to 8 too, and resume=true cannot: start a new run"),
        ("trainer.steps=3", "cannot: add schedule.T_max=5 to keep it and end early, or start a new run"),
    ],
)
def test_what_was_learned_with_is_refused_and_the_record_stays(started_run, typed, why):
    before = recorded(started_run)
    key, _, value = typed.lstrip("+").partition("=")
    with pytest.raises(InvalidValue, match=re.escape(f"{key}={value}: ") + ".*" + re.escape(why)):
        go_on(started_run, typed)
    assert recorded(started_run) == before


def test_what_may_change_is_applied_and_recorded_with_its_step(tmp_path):
    started = ["schedule=constant", "trainer.steps=4"]
    train(tmp_path, *started)
    typed = ["trainer.steps=6", "trainer.log_every=2", "evaluation=default", "evaluation.tasks=2"]
    settings = ["evaluation/baseline=[]", "evaluation.inner_steps=1"]
    go_on(tmp_path, *typed, *settings)
    folder = RunFolder(tmp_path)
    config, overrides = folder.config(), folder.overrides()
    assert (config.trainer.steps, config.trainer.log_every, config.evaluation.tasks) == (6, 2, 2)
    assert set(typed) <= set(overrides) and not {"trainer.steps=4", "evaluation=none"} & set(overrides)
    assert folder.choices()["evaluation"] == "default"
    (entry,) = json.loads((tmp_path / "resumed.json").read_text())
    assert entry["step"] == 4 and entry["changes"]["trainer.steps"] == [4, 6]
    result = folder.read_result()
    assert result["step"] == 6 and result["evaluation"] is not None
    assert folder.finished(result["overrides"])


def test_an_experiment_that_changes_nothing_learned_is_recorded(started_run):
    quick = ["evaluation=default", "evaluation.tasks=2", "evaluation/baseline=[]"]
    go_on(started_run, "experiment=sinusoid_shots", *quick)
    folder = RunFolder(started_run)
    assert folder.choices()["experiment"] == "sinusoid_shots"
    assert "experiment=sinusoid_shots" in folder.overrides()


def test_a_changed_length_is_taken_where_the_schedule_keeps_its_own(started_run):
    go_on(started_run, "trainer.steps=7", "schedule.T_max=5")
    assert state_of(started_run)["scheduler"]["T_max"] == 5
    assert steps_done(started_run) == 7


def test_fewer_steps_than_were_taken_are_refused(tmp_path):
    train(tmp_path, "trainer.steps=5", "schedule=constant")
    with pytest.raises(InvalidValue, match=r"trainer.steps=3: this run has taken 5 steps already"):
        train(tmp_path, "trainer.steps=3", "schedule=constant", "resume=true")


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
