"""A default run gives the same bits whatever the clock says and whatever the cache folder holds."""

import random
import time
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_module

from mlframework.backend.plan import ExecutionPlan
from mlframework.base_layers import MLP
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.runs.run import train_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.training.outer_loop import OuterLoop

SMALL = [
    "trainer.steps=3",
    "trainer.meta_batch=4",
    "trainer.validation_tasks=2",
    "trainer.checkpoint_every=3",
    "evaluation=none",
    "logger.figures=false",
    "device=cpu",
    "threads=1",
]
#: Layers large enough that a stopwatch used to choose how they are convolved.
IMAGES = ["task=digits", "task.k_shot=4", "task.k_query=4", "base_layer=conv4", "base_layer.filters=64"]

RUNS = {
    "conv4": ["algorithm=maml", *IMAGES],
    "meta_networks": ["algorithm=meta_networks", *IMAGES],
    "maml_plus_plus": ["algorithm=maml_plus_plus", "base_layer.hidden=[8]"],
    "text": ["task=text_lists", "algorithm=fomaml", "base_layer=gru", "base_layer.width=8", "task.length=16"],
    "loop": ["algorithm=maml", "base_layer.hidden=[8]", "outer.engine=loop"],
    "limit": ["algorithm=maml", "base_layer.hidden=[8]", "outer.memory_limit=0.0001"],
    "captured": ["algorithm=maml", "base_layer.hidden=[4]", "outer.capture=true"],
}


class LyingClock:
    """Time that passes at random: whatever a stopwatch decides by it is chance."""

    def __init__(self, seed):
        self.draw, self.now = random.Random(seed), 0.0

    def __call__(self):
        self.now += self.draw.expovariate(1)
        return self.now


def trained(folder, cache, overrides, monkeypatch):
    """The state at the end of a run that starts with nothing but the cache folder."""
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(cache))
    overrides = [*SMALL, *overrides, f"run_dir={folder}"]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", overrides)
    train_run(config, RunFolder(folder), overrides=overrides)
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return state["meta_layer"], state["optimizer"]["state"]


#: These read or compile for seconds with every empty cache.
SLOW = ("conv4", "text", "captured")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RUNS]
)
def test_fresh_caches_a_warm_one_and_a_lying_clock_give_the_same_bits(tmp_path, monkeypatch, name):
    expected = trained(tmp_path / "first", tmp_path / "one", RUNS[name], monkeypatch)
    for seed, cache in ((1, "two"), (2, "one")):
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", LyingClock(seed))
            found = trained(tmp_path / str(seed), tmp_path / cache, RUNS[name], patch)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_resumed_run_takes_the_pace_that_its_stopwatch_chose_at_the_start(tmp_path, monkeypatch):
    run = ["algorithm=maml", *IMAGES, "schedule=constant"]
    for process in range(1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", LyingClock(process))
            typed = ["outer.chunk=auto", f"trainer.steps={3 * process}", f"resume={str(process > 1).lower()}"]
            found = trained(tmp_path / "run", tmp_path / f"cache{process}", [*run, *typed], patch)
    result = RunFolder(tmp_path / "run").read_result()
    pace = [f"outer.engine={result['engine']}", f"outer.chunk={result['chunk']}", "trainer.steps=9"]
    expected = trained(tmp_path / "given", tmp_path / "cache", [*run, *pace], monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_was_asked_anew_is_chosen_anew():
    outer, other = (loop_of("auto") for _ in range(2))
    outer.planner.plans[8] = ExecutionPlan("loop", 4)
    state = outer.planner.choices()
    other.planner.restore_choices(state)
    assert other.planner.plan_of(8) == ExecutionPlan("loop", 4) and other.meta_layer.engine == "loop"
    ruled = loop_of(None)
    ruled.planner.restore_choices(state)
    assert not ruled.planner.plans and ruled.meta_layer.engine == "vectorised"


def loop_of(chunk):
    task = Sinusoid()
    layer = MAML(MLP(task.spec, hidden=[4]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    return OuterLoop(layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), chunk=chunk)
