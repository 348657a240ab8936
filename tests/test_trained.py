"""A trained run in use: predictions are those of its evaluation, whatever stands beside a query."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from commands import call

import mlframework
from mlframework.cli.train import main
from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.evaluation.task_set import TaskSet
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder

#: Digits by batch norm, trained for a second and judged on eight tasks.
DIGITS = (
    *("task=digits", "base_layer.norm=batch", "trainer.steps=5", "trainer.meta_batch=4", "trainer.validation_tasks=2"),
    *("evaluation.tasks=8", "evaluation.validation_tasks=4", "evaluation/baseline=[]", "logger.figures=false"),
    *("task.k_shot=2", "task.k_query=4"),
    *("suggested.inner_steps=2", "suggested.test_inner_steps=2"),
)


@pytest.fixture(scope="module", params=["prototypes-support", "maml-inductive", "maml-transductive"])
def run(request, tmp_path_factory):
    """A run folder and its policy."""
    algorithm, policy = request.param.split("-")
    folder = tmp_path_factory.mktemp("runs")
    typed = (*DIGITS, f"algorithm={algorithm}", f"algorithm.batch_norm={policy}", "run_dir=run")
    assert call(main, *typed, folder=folder).exit_code == 0
    return folder / "run", policy


def tasks_of(folder):
    """The test tasks of a run's evaluation."""
    return TaskSet(load_run(RunFolder(folder), weights="best", device="cpu").task, "test", tasks=8, seed=0, chunk=1)


def a_model(folder):
    """The model of the first test task, and its queries."""
    episode = next(iter(tasks_of(folder)))
    return mlframework.load(folder, device="cpu").adapt(episode.support), episode.query.x[0]


def test_predictions_reach_the_accuracy_of_the_evaluation(run):
    folder, policy = run
    rows = json.loads((folder / "result.json").read_text())["evaluation"]["rows"]
    (row,) = (row for row in rows if row["batch_norm"] == policy and not row["method"].startswith("scikit"))
    trained = mlframework.load(folder, device="cpu")
    found = []
    for episode in tasks_of(folder):
        prediction = trained.adapt(episode.support, inner_steps=row["chosen"]).predict(episode.query.x[0])
        found.append((prediction.argmax(-1) == episode.query.y[0]).float().mean())
    judged = row["metrics"]["query_accuracy"][row["steps"].index(row["chosen"])]["mean"]
    assert float(torch.stack(found).mean()) == pytest.approx(judged, abs=1e-6)


def test_a_query_alone_is_predicted_as_among_others_unless_queries_normalise_each_other(run):
    folder, policy = run
    model, x = a_model(folder)
    for given in ("support", "inductive", *([None] if policy != "transductive" else [])):
        alone = torch.cat([model.predict(x[i : i + 1], batch_norm=given) for i in range(len(x))])
        torch.testing.assert_close(alone, model.predict(x, batch_norm=given), rtol=1e-4, atol=1e-5)


def test_transductive_predictions_ask_for_all_queries(run, caplog):
    folder, policy = run
    model, x = a_model(folder)
    given = None if policy == "transductive" else "transductive"
    with pytest.raises(InvalidValue, match=r"batch_norm=transductive: normalises queries by one another"):
        model.predict(x[:1], batch_norm=given)
    with caplog.at_level(logging.WARNING):
        together = model.predict(x, batch_norm=given)
        model.predict(x, batch_norm=given)
    assert [record.message for record in caplog.records] == [
        f"batch_norm=transductive: predictions hold for these {len(x)} queries together"
    ]
    assert not torch.allclose(model.predict(x[:2], batch_norm=given), together[:2], atol=1e-3)


def test_a_policy_that_there_is_not_is_refused(run):
    model, x = a_model(run[0])
    with pytest.raises(InvalidValue, match="batch_norm=running: must be one of transductive, inductive, support"):
        model.predict(x, batch_norm="running")


def test_without_layers_that_mix_examples_a_query_may_stand_alone(tmp_path):
    typed = ("trainer.steps=2", "trainer.validation_tasks=2", "evaluation=none", "logger.figures=false")
    assert call(main, *typed, "run_dir=run", folder=tmp_path).exit_code == 0
    x = torch.linspace(-1, 1, 10).view(1, 10, 1)
    model = mlframework.load(tmp_path / "run", device="cpu").adapt(Examples(x, x.sin(), torch.ones(1, 10)))
    torch.testing.assert_close(model.predict(x[0, :1]), model.predict(x[0])[:1], rtol=1e-5, atol=1e-6)
