"""`mlframework-compare`: trains or takes a run and writes a report; wrong input ends in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import SHORT, call

from mlframework.cli import compare, evaluate, train
from mlframework.evaluation.task_set import TaskSet
from mlframework.runs.board import read_board
from mlframework.runs.compare import Compared
from mlframework.runs.compare_report import comparison_figure, comparison_page
from mlframework.tasks import Sinusoid

FEW = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "shots=[]")
#: Three contenders that take no time.
QUICK = (
    "against=[scratch,finetune,knn]",
    "++evaluation.baseline.from_scratch.steps=2",
    "++evaluation.baseline.finetune.steps=2",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a trained run."""
    folder = tmp_path_factory.mktemp("world")
    said = call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=folder)
    assert said.exit_code == 0, said.err
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def test_one_command_trains_compares_and_says_what_comes_next(tmp_path):
    said = call(compare.main, *SHORT, *FEW, *QUICK, "run_dir=new", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert "on 4 test tasks (seed 0, hash " in said.out
    *_, written, after = said.out.splitlines()
    assert written == "written to new: comparison.md, comparison.png, comparison.json"
    assert after == "next: mlframework-compare run=new evaluation.seed=1 board=true"
    assert (tmp_path / "new" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    content = report_of(tmp_path / "new")
    assert [each["row"]["method"] for each in content["own"]["standings"]] == [
        *("maml", "from scratch", "fine-tuning", "nearest neighbours"),
    ]
    assert content["command"].startswith("mlframework-compare trainer.steps=2")
    record = yaml.safe_load((tmp_path / "new" / "overrides.yaml").read_text(encoding="utf-8"))
    assert not [each for each in record if each.startswith(("against", "shots"))], "a training knows neither"


def test_a_run_is_compared_as_it_is_on_the_tasks_of_an_evaluation(world):
    before = (world / "run" / "checkpoints" / "best.safetensors").read_bytes()
    assert call(compare.main, "run=run", *FEW, *QUICK, folder=world).exit_code == 0
    assert call(evaluate.main, "run=run", *FEW[:2], "evaluation/baseline=[]", folder=world).exit_code == 0
    own, evaluated = report_of(world / "run")["own"], json.loads((world / "run" / "evaluation.json").read_text())
    assert own["task_hash"] == evaluated["task_hash"] == TaskSet(Sinusoid(), "test", tasks=4, seed=0).hash()
    assert own["standings"][0]["row"]["values"] == evaluated["rows"][0]["values"]
    assert (world / "run" / "checkpoints" / "best.safetensors").read_bytes() == before


def test_what_is_drawn_is_what_was_written(world):
    said = call(compare.main, "run=run", *FEW[:2], "against=[knn]", "shots=[2]", *FEW_POINTS, folder=world)
    assert said.exit_code == 0, said.err
    content = report_of(world / "run")
    compared = Compared.from_json(content)
    assert json.loads(json.dumps(compared.to_json())) == {name: content[name] for name in compared.to_json()}
    assert comparison_page(compared, content) == (world / "run" / "comparison.md").read_text(encoding="utf-8")
    assert len(comparison_figure(compared).axes) == 2


FEW_POINTS = ("curve.tasks=3", "curve.validation_tasks=2")


def test_a_learning_curve_has_the_same_weights_at_other_shots(world):
    said = call(compare.main, "run=run", *FEW[:2], "against=[knn]", "shots=[2,10,20]", *FEW_POINTS, folder=world)
    assert said.exit_code == 0, said.err
    content = report_of(world / "run")
    curve = content["curve"]
    assert list(curve) == ["2", "10", "20"] and content["shots"] == 10
    assert curve["10"] == content["own"], "the run's own number of shots is judged once"
    for shots in (2, 20):
        found = curve[str(shots)]
        assert found["task_hash"] == TaskSet(Sinusoid(k_shot=shots, k_query=10), "test", tasks=3, seed=0).hash()
    assert ": nearest neighbours\n" in said.out and set(content["crossings"]) == {"nearest neighbours"}


def test_shots_that_a_task_has_no_examples_for_are_named(tmp_path):
    images = ("task=digits", "algorithm=prototypes", "run_dir=run", "against=[knn]", "shots=[2,900]", *FEW_POINTS)
    said = call(compare.main, *SHORT, *FEW[:2], *images, folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert "no learning curve at 900 shots: k_shot=900: " in said.err
    assert list(report_of(tmp_path / "run")["curve"]) == ["2", "5"]


def test_the_same_weights_are_judged_on_other_tasks_of_the_same_spec(world):
    other = "cross=['task=sinusoid task.k_query=3']"
    said = call(compare.main, "run=run", *FEW, "against=[knn]", other, folder=world)
    assert said.exit_code == 0, said.err
    (found,) = report_of(world / "run")["across"].values()
    assert found["task_hash"] == TaskSet(Sinusoid(k_shot=10, k_query=3), "test", tasks=4, seed=0).hash()
    assert "## The same weights on task=sinusoid task.k_query=3" in (world / "run" / "comparison.md").read_text()


def test_records_go_to_the_board(world, monkeypatch):
    monkeypatch.setattr(compare, "git_state", lambda: {"commit": "1" * 40, "changed": False})
    said = call(compare.main, "run=run", *FEW, *QUICK, "board=true", folder=world)
    assert said.exit_code == 0, said.err
    records = read_board(world / "results" / "board")
    assert [line for line in said.out.splitlines() if line.startswith("on the board: results/board/sinusoid_")]
    assert {record.method for record in records.values()} == {
        "maml",
        "from scratch",
        "fine-tuning",
        "nearest neighbours",
    }
    assert {record.commit for record in records.values()} == {"1" * 40}


def test_all_contenders_that_suit_the_task_are_taken_unless_some_are_named(world, monkeypatch):
    from mlframework.runs import compare as of_runs

    plans = []
    monkeypatch.setattr(of_runs, "compare_run", lambda folder, plan, device: plans.append(plan) or stop())
    said = call(compare.main, "run=run", *FEW, folder=world)
    assert "in_context is left out" in said.err
    assert list(plans[0].contenders) == [
        *(
            "from_scratch",
            "finetune",
            "linear_probe",
            "nearest_neighbours",
            "gradient_boosting",
            "random_forest",
            "support_vectors",
        ),
        "scikit_learn",
    ]
    pretraining = plans[0].contenders["finetune"].pretraining
    assert (pretraining.steps, pretraining.meta_batch) == (2, 2), "as many as meta-training took"


def stop():
    raise SystemExit(0)


WRONG = [
    (["against=[scrach]"], "against=scrach: no such contender (did you mean scratch?); there are "),
    (["against=[knn,knn]"], "against=knn: is named twice"),
    (["against=[scratch,from_scratch]"], "against=scratch: is named twice"),
    (["against=[in_context]"], "against: in_context is for a sequence, and Sinusoid is a regression"),
    (["against=knn"], "against=knn: must be a list or null"),
    (["run"], "run: cannot be read as key=value: type run=run"),
    (["run=nope"], "nope: there is no such run folder"),
    (["run="], "run=: must name a folder"),
    (["run=run", "task=glyphs"], "task=glyphs: run=... keeps the settings of the run"),
    (["run=run", "algorithm/update=sgd"], "algorithm/update=sgd: run=... keeps the settings of the run"),
    (["shots=[0]"], "shots=0: must be at least 1"),
    (["shots=ten"], "shots=ten: must be a list"),
    (["curve.tasks=0"], "curve.tasks=0: must be at least 1"),
    (["curve.task=1"], "curve.task=1: there is no curve.task (did you mean tasks?)"),
    (["cross=[omniglo]"], "task=omniglo: no such option (did you mean omniglot?)"),
    (
        ["run=run", "cross=[digits]"],
        "cross=digits: its spec is ('classification', (1, 8, 8), 2), and the run has learned",
    ),
    (["board=perhaps"], "board=perhaps: must be true or false"),
    (
        ["+evaluation.baseline.support_vectors.taks=3"],
        "evaluation.baseline.support_vectors.taks=3: Conventional has no such setting (did",
    ),
    (
        ["run=run", "+evaluation.baseline.support_vectors.tasks=x"],
        "evaluation.baseline.support_vectors.tasks=x: must be a whole number or null",
    ),
    (["task=sinusod"], "task=sinusod: no such option (did you mean sinusoid?)"),
    (["+foo=1"], "foo=1: nothing reads foo; there are seed, threads, "),
    (["evaluation=none"], "evaluation=none: a comparison needs one: leave it out"),
]


@pytest.mark.parametrize(("typed", "line"), WRONG, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_a_wrong_input_is_refused_in_one_line_before_anything_is_written(world, typed, line):
    before = {path: path.stat().st_size for path in world.rglob("*")}
    run_dir = [] if any(each.startswith("run=") for each in typed) else [*SHORT, "run_dir=new"]
    said = call(compare.main, *run_dir, *typed, folder=world)
    assert said.err.splitlines()[-1].startswith(line), said.err
    assert (said.exit_code, said.out) == (2, "")
    assert {path: path.stat().st_size for path in world.rglob("*")} == before


def test_help(tmp_path):
    said = call(compare.main, "--help", folder=tmp_path)
    assert said.exit_code == 0
    for words in ("mlframework-compare run=runs/mine against=[scratch,finetune,knn]", "against: null", "board: false"):
        assert words in said.out
