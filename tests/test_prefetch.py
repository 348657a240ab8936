"""Episodes drawn ahead: which they are, what a checkpoint keeps of them, and how the thread ends."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from commands import call
from hydra import compose, initialize_config_module

from mlframework.cli.train import main
from mlframework.errors import InvalidValue
from mlframework.runs.run import train_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.training.checkpoint import Progress
from mlframework.training.prefetch import Prefetch
from mlframework.training.trainer import Trainer

TASK = Sinusoid(k_shot=3, k_query=2)
OVERRIDES = [
    "base_layer.hidden=[8]",
    "trainer.meta_batch=4",
    "trainer.validation_tasks=4",
    "trainer.validate_every=10",
    "trainer.checkpoint_every=7",
    "evaluation=none",
    "logger.figures=false",
]


def draw(generator: torch.Generator):
    return TASK.sample(4, "train", generator)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_episodes_and_states_are_those_of_drawing_one_by_one(ahead):
    one_by_one, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with Prefetch(draw, generator, ahead=ahead) as episodes:
        for step in range(20):
            assert episodes.next().hash() == draw(one_by_one).hash()
            assert torch.equal(generator.get_state(), one_by_one.get_state())
            assert bool(threads()) == (ahead > 0)
            time.sleep(0.002 * (step % 3))  # now the thread has drawn all it may, now nothing
    assert not threads()


def test_no_more_than_what_is_allowed_is_drawn_ahead():
    drawn = []

    def counted(generator: torch.Generator):
        drawn.append(None)
        return draw(generator)

    with Prefetch(counted, torch.Generator(), ahead=3) as episodes:
        for taken in range(1, 8):
            episodes.next()
            time.sleep(0.05)
            assert len(drawn) <= taken + 3
    assert len(drawn) == 7 + 3


def test_what_drawing_raises_is_raised_where_the_episode_is_asked_for():
    left = iter(range(6))

    def failing(generator: torch.Generator):
        if next(left, None) is None:
            raise InvalidValue("k_shot", 3, "there is no more")
        return draw(generator)

    with Prefetch(failing, torch.Generator(), ahead=2) as episodes:
        for _ in range(6):
            episodes.next()
        with pytest.raises(InvalidValue, match="there is no more"):
            episodes.next()
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_the_training_however_it_ends(error):
    def training() -> None:
        with Prefetch(draw, torch.Generator(), ahead=2) as episodes:
            for _ in range(5):
                episodes.next()
            assert threads()
            raise error

    with pytest.raises(error):
        training()
    assert not threads()


def train(folder, *more: str):
    overrides = [*OVERRIDES, *more]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, f"run_dir={folder}"])
    train_run(config, RunFolder(folder), overrides=overrides)
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def same(one, other) -> bool:
    weights = one["meta_layer"], other["meta_layer"]
    return torch.equal(one["generators"]["tasks"], other["generators"]["tasks"]) and all(
        torch.equal(value, weights[1][name]) for name, value in weights[0].items()
    )


def test_a_run_that_draws_ahead_learns_the_same_and_is_resumed_where_it_was(tmp_path, monkeypatch):
    here = train(tmp_path / "here", "trainer.steps=20", "trainer.prefetch=0")
    ahead = train(tmp_path / "ahead", "trainer.steps=20", "trainer.prefetch=3")
    assert same(here, ahead)

    class Killed(BaseException):
        pass

    save = Trainer.save

    def save_and_die(trainer: Trainer, training, progress: Progress):
        time.sleep(0.05)  # the thread has drawn all it may
        save(trainer, training, progress)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_die)
        with pytest.raises(Killed):
            train(tmp_path / "killed", "trainer.steps=20", "trainer.prefetch=3")
    assert not threads()
    assert same(here, train(tmp_path / "killed", "trainer.steps=20", "resume=true"))
    assert not threads()


def test_less_than_nothing_is_refused(tmp_path):
    said = call(main, "trainer.prefetch=-1", f"run_dir={tmp_path / 'run'}", folder=tmp_path)
    assert (said.exit_code, said.err) == (2, "trainer.prefetch=-1: must be at least 0, which draws nothing ahead\n")
