"""Several processes take a run's tasks between them, and come to the result of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pytest
import ranks
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from mlframework import processes
from mlframework.runs.run import set_up
from mlframework.runs.run_folder import RunFolder

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
COMMON = (
    "trainer.steps=50",
    "trainer.validate_every=25",
    "trainer.validation_tasks=5",
    "trainer.meta_batch=7",
    "trainer.log_every=10",
    "evaluation=none",
    "display=[]",
    "threads=1",
    "device=cpu",
)
IMAGES = ("task=digits", "task.k_shot=1", "task.k_query=2", "base_layer=conv4", "base_layer.filters=4")
TEXT = ("task=text_lists", "task.length=12", "base_layer=gru", "base_layer.width=8")
#: Not Adam: a bias before a batch norm has no gradient but rounding, which Adam divides by its size.
SGD = ("optimizer=sgd", "optimizer.lr=0.001")
RUNS = {
    "maml": ("algorithm=maml", "task=sinusoid", "base_layer.hidden=[8]"),
    "maml_plus_plus": ("algorithm=maml_plus_plus", *IMAGES, *SGD[:1], "optimizer.lr=1e-5", "algorithm.inner_steps=2"),
    "prototypes": ("algorithm=prototypes", *IMAGES, *SGD),
    "svm": ("algorithm=svm", *IMAGES, *SGD),
    "lora": ("algorithm=lora", *TEXT),
}


def outer_steps(file: Path, names: Sequence[str], *more: str) -> None:
    """Takes the outer steps of runs in float32 and float64, and saves the parameters by name."""
    found = {}
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        configs = {n: compose("train", [*RUNS[n], *COMMON, *more, f"run_dir={file.parent}"]) for n in names}
    for (name, config), dtype in product(configs.items(), TOLERANCES):
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        training = set_up(config, RunFolder(config.run_dir))
        for step in range(config.trainer.steps):
            instantiate(config.trainer).outer_step(training, step)
        found[name, dtype] = training.meta_layer.state_dict()
        if more:
            assert all(training.outer.capture.decided.values()), "a step was not compiled"
    if processes.leads():
        torch.save(found, file)


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference between the numbers of two modules."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_alike(folder: Path, names: Sequence[str], *more: str) -> None:
    """The parameters of two and of three processes are those of one."""
    for count in (1, 2, 3):
        ranks.run(count, outer_steps, folder / f"{count}.pt", names, *more)
    one, *others = (torch.load(folder / f"{count}.pt") for count in (1, 2, 3))
    off = {key: max(farthest(one[key], other[key]) for other in others) for key in one}
    assert {key: far for key, far in off.items() if far > TOLERANCES[key[1]]} == {}


def test_shares_are_all_tasks_once_and_differ_by_one(monkeypatch):
    for count in (1, 2, 3, 8):
        shares = []
        for rank in range(count):
            monkeypatch.setattr(processes.Group, "current", processes.Group(rank, count, None))
            shares.append(processes.share(7))
        assert [task for share in shares for task in range(7)[share]] == list(range(7))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
def test_seven_tasks_over_one_two_and_three_processes_end_alike(tmp_path):
    check_alike(tmp_path, tuple(RUNS))


@pytest.mark.slow
def test_compiled_steps_of_one_two_and_three_processes_end_alike(tmp_path):
    check_alike(tmp_path, ("maml",), "outer.capture=true", "algorithm.inner_steps=1")


@pytest.mark.slow
def test_a_whole_run_with_its_evaluation_ends_as_that_of_one_process(tmp_path):
    common = [override for override in COMMON if override != "evaluation=none"]
    judged = ("evaluation.tasks=5", "evaluation.validation_tasks=3", "evaluation/baseline=[from_scratch]")
    scratch = [f"evaluation.baseline.from_scratch.{name}=5" for name in ("tasks", "steps")]
    for count in (1, 2):
        ranks.run(count, ranks.train, tmp_path / str(count), *RUNS["maml"], *common, *judged, *scratch)
    one, two = (json.loads((tmp_path / str(count) / "result.json").read_text()) for count in (1, 2))
    assert two["best"]["step"] == one["best"]["step"]
    assert two["evaluation"]["task_hash"] == one["evaluation"]["task_hash"]
    rows = list(zip(two["evaluation"]["rows"], one["evaluation"]["rows"], strict=True))
    assert len(rows) == 2
    for ours, theirs in rows:
        assert (ours["method"], ours["setting"], ours["chosen"]) == (
            theirs["method"],
            theirs["setting"],
            theirs["chosen"],
        )
        assert ours["values"]["query_loss"] == pytest.approx(theirs["values"]["query_loss"], rel=1e-4)
    assert len(list((tmp_path / "2").glob("events*"))) == 1, "rank 0 alone writes"


LEAVING = """
from pathlib import Path
from mlframework import processes

with processes.joined():
    import torch._dynamo  # as a run imports it, once it has joined
    processes.gathered(None)
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print([name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_who_has_left_keeps_no_thread_of_the_group():
    """Python, when it ends, aborts a thread that lets go of a tensor then."""
    port = str(ranks.free_port())
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["[]", "[]"]
