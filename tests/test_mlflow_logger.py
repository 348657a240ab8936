"""The second logger: the same run in MLflow's local files."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from commands import SHORT, call
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlframework.cli import train
from mlframework.errors import InvalidValue

mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")

#: MLflow's own imports and its database warn of their own versions.
pytestmark = pytest.mark.filterwarnings("ignore")

#: Settings of a training whose points come at every step.
RUN = (*SHORT, "trainer.log_every=1", "logger.figures=true", "display=[by_inner_step,learned,inner_steps]")


def run_of(folder):
    """The client and the run of a run folder."""
    record = json.loads((folder / "mlflow.json").read_text(encoding="utf-8"))
    client = mlflow.MlflowClient(tracking_uri=record["uri"])
    return client, client.get_run(record["run_id"])


def points(client, run, tag):
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, tag)]


@pytest.mark.slow
def test_a_run_says_the_same_in_mlflow_and_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "evaluation/baseline=[]", "algorithm=meta_sgd")
    other = [each for each in RUN if each != "logger.figures=false"]
    for logger in ("tensorboard", "mlflow"):
        said = call(train.main, *other, *few, f"logger={logger}", f"run_dir={logger}", folder=tmp_path)
        assert said.exit_code == 0, said.err
    client, run = run_of(tmp_path / "mlflow")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mlflow")
    assert run.data.params["algorithm"] == "meta_sgd"
    assert run.data.tags["overrides"].startswith("trainer.steps=2 ")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = set(board.Tags()["scalars"]) - {"run/finished"}
    assert {"test/query_loss", "best/step", "train/query_loss"} <= scalars
    histograms = {f"{tag}/{name}" for tag in board.Tags()["histograms"] for name in ("min", "median", "max")}
    assert scalars | histograms <= set(run.data.metrics)
    for tag in scalars - {"train/tasks_per_second"}:
        wanted = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(tag)]
        assert points(client, run, tag) == wanted, tag
    files = {file.path for file in client.list_artifacts(run.info.run_id, "validation/by_inner_step")}
    assert files == {"validation/by_inner_step/step_00000002.png"}


@pytest.fixture
def logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return maker(tmp_path)


def maker(folder):
    from mlframework.training.mlflow_logger import MLflowLogger

    def make(start=0):
        return MLflowLogger(folder, start=start, uri=f"sqlite:///{folder}/mlflow.db", experiment="tests")

    return make


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path, logger):
    killed = logger()
    killed.scalars({"train/query_loss": 3.0}, 1)
    killed.flush()  # before a checkpoint
    assert not killed.points, "a long run holds no points that are written"
    killed.scalars({"train/query_loss": 2.0}, 2)
    resumed = logger(start=1)
    resumed.scalars({"train/query_loss": 1.0}, 2)
    resumed.histograms({"learned/rates": torch.tensor([1.0, 2.0, math.nan])}, 2)
    resumed.figure("validation/tasks", Figure(figsize=(1, 1)), 2)
    resumed.text("validation/samples", "**a**", 2)
    resumed.close("step 3: the meta-loss is not finite")
    client, run = run_of(tmp_path)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert points(client, run, "train/query_loss") == [(1, 3.0), (2, 1.0)]
    assert points(client, run, "learned/rates/median") == [(2, 1.5)]
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "step 3: the meta-loss is not finite")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "validation")] == [
        "validation/samples",
        "validation/tasks",
    ]


@pytest.mark.slow
def test_a_place_that_mlflow_cannot_write_to_is_named(tmp_path):
    from mlframework.training.mlflow_logger import MLflowLogger

    (tmp_path / "file").touch()
    with pytest.raises(InvalidValue, match=r"uri=sqlite:////.*/file/mlflow.db: MLflow cannot write there"):
        MLflowLogger.check(uri=f"sqlite:///{tmp_path}/file/mlflow.db", experiment="tests")


def test_without_mlflow_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said = call(train.main, *SHORT, "evaluation=none", "logger=mlflow", "run_dir=run", folder=tmp_path)
    assert said.exit_code == 2
    assert said.err.startswith("logger=mlflow: needs an extra: pip install 'mlframework[mlflow]'")
    assert not (tmp_path / "run").exists()
