"""A sweep that is killed in the middle and goes on with one more value: the same table under every launcher.

A job diverges, and a job fails. A task of the tests' own counts the meta-batches of each job. It holds one job up until
the sweep is killed, so that this happens in the same place each time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import call
from test_sweep import table

from mlframework.cli import table as table_command

pytestmark = pytest.mark.slow

COUNTED = '''
import os
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from mlframework.tasks import Sinusoid

HERE = Path(__file__).parent


class Counted(Sinusoid):
    """Writes down each meta-batch of training; one job waits before its third one until there is a file `go`."""

    def sample(self, num_tasks, split, generator):
        if split == "train" and num_tasks == 3:
            config = HydraConfig.get()
            drawn = Path(config.runtime.output_dir) / "drawn"
            count = drawn.read_text().count("x") if drawn.exists() else 0
            if "optimizer.lr=0.02" in config.overrides.task and count == 2:
                (HERE / "held").touch()
                while not (HERE / "go").exists():
                    time.sleep(0.1)
            with drawn.open("a") as file:
                file.write("x")
        return super().sample(num_tasks, split, generator)
'''

SMALL = (
    *("task=sinusoid", "task._target_=counted.Counted", "trainer.meta_batch=3", "trainer.steps=4", "threads=1"),
    *("trainer.validation_tasks=4", "trainer.validate_every=2", "trainer.checkpoint_every=1", "logger.figures=false"),
    *("evaluation.tasks=5", "evaluation.validation_tasks=4", "evaluation/baseline=[]", "base_layer.hidden=[8]"),
)
#: A job that fails, one that is held up, one that diverges; the second sweep has one value more.
BEFORE, AFTER = "optimizer.lr=0.01,-1,0.02,1e30", "optimizer.lr=0.01,-1,0.02,1e30,0.03"
GRID = (
    *("sweep=optuna", "hydra.sweeper.params=null", "hydra.sweeper.n_jobs=1"),
    "hydra.sweeper.sampler._target_=optuna.samplers.GridSampler",
)
LAUNCHERS = {
    "basic": [],
    "joblib": ["launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["launcher=submitit", "hydra.launcher.n_jobs=2"],
    "ray": ["launcher=ray", "hydra.launcher.cpus=2"],
    "optuna": GRID,
}
PATIENCE = 300


def start(folder: Path, *typed: str) -> subprocess.Popen:
    """A sweep in a process group of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "counted.py").write_text(COUNTED)
    command = [sys.executable, "-m", "mlframework.cli.train", "-m", "hydra.sweep.dir=sweep", *SMALL, *typed]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with (folder / "said").open("a") as said:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)


def ended(folder: Path, *processes: subprocess.Popen) -> None:
    """Waits for sweeps with failed jobs; their exit code is 1."""
    codes = [process.wait(PATIENCE) for process in processes]
    assert codes == [1] * len(codes), (folder / "said").read_text()


def killed_when_held(folder: Path, process: subprocess.Popen, others: int) -> None:
    """Kills a sweep once its job is held up, and so many others have ended: none is cut off within a step."""
    until = time.monotonic() + PATIENCE
    while not (folder / "held").exists() or len(records(folder)) < others:
        assert process.poll() is None and time.monotonic() < until, (folder / "said").read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def records(folder: Path) -> list[Path]:
    """Of the jobs that finished, failed or diverged."""
    return [path for name in ("result.json", "failed.json") for path in folder.glob(f"sweep/*/{name}")]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The table, made again: everything but the time and the place."""
    said = call(table_command.main, "sweep", folder=folder)
    assert said.exit_code == 0, said.err
    rows = sorted(table(folder / "sweep"), key=lambda row: float(row["optimizer.lr"]))
    return [row | {"seconds": "", "error": row["error"].replace(str(folder), "")} for row in rows]


def meta_batches(folder: Path) -> dict[str, int]:
    """How many meta-batches each job has trained on, those of killed processes included."""
    return {path.parent.name: path.read_text().count("x") for path in folder.glob("sweep/*/drawn")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The longer sweep, one job after another without a break: its table and its meta-batches."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "go").touch()
    ended(folder, start(folder, AFTER))
    rows = rows_of(folder)
    assert [row["status"] for row in rows] == ["failed", "finished", "finished", "finished", "diverged"]
    assert all(row["test"] for row in rows if row["status"] == "finished")
    assert "must be" in rows[0]["error"] or "learning rate" in rows[0]["error"]
    return rows, meta_batches(folder)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_that_was_killed_and_goes_on_with_one_more_value_has_the_same_table(whole, tmp_path, launcher):
    if launcher in ("optuna", "ray", "submitit"):
        pytest.importorskip(launcher, minversion="4" if launcher == "optuna" else None)
    one_by_one = launcher in ("basic", "optuna")
    killed_when_held(tmp_path, start(tmp_path, BEFORE, *LAUNCHERS[launcher]), others=0 if one_by_one else 3)
    (held,) = (row for row in rows_of(tmp_path) if row["optimizer.lr"] == "0.02")
    assert held["status"] in ("interrupted", "running")  # a process of its own outlives the sweep's
    (tmp_path / "go").touch()

    processes = 2 if launcher == "optuna" else 1
    ended(tmp_path, *(start(tmp_path, AFTER, *LAUNCHERS[launcher]) for _ in range(processes)))
    rows, counts = whole
    assert rows_of(tmp_path) == rows
    assert meta_batches(tmp_path) == counts
