"""Launchers start jobs of several ranks, for real: submitit's local executor and Ray on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import ranks

pytestmark = pytest.mark.slow

OVERRIDES = (
    "task=sinusoid",
    "base_layer.hidden=[8]",
    "trainer.steps=20",
    "trainer.meta_batch=3",
    "trainer.validation_tasks=4",
    "evaluation=none",
    "display=[]",
    "threads=1",
    "device=cpu",
)
LAUNCHERS = {
    "submitit": ("hydra.launcher.tasks_per_node=2", "hydra.launcher.n_jobs=1"),
    "ray": ("hydra.launcher.ranks_per_job=2", "hydra.launcher.cpus=2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_of_two_ranks_ends_as_one_of_one_process(launcher, tmp_path):
    pytest.importorskip(launcher)
    sweep = ("-m", f"launcher={launcher}", *LAUNCHERS[launcher], f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=0")
    command = [sys.executable, "-m", "mlframework.cli.train", *sweep, *OVERRIDES]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each.parent.name: ranks.state_of(each.parent) for each in (tmp_path / "sweep").glob("*/result.json")}
    assert len(found) == 1
    for name, state in found.items():
        assert len(state["ranks"]) == 1, "the job had one process"
        seed = json.loads((tmp_path / "sweep" / name / "result.json").read_text())["overrides"][0]
        ranks.train(tmp_path / name, *OVERRIDES, seed)
        one = ranks.state_of(tmp_path / name)["meta_layer"]
        assert max(float((one[key] - value).abs().max()) for key, value in state["meta_layer"].items()) <= 1e-6
