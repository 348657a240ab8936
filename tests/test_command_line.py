"""The command lines around Hydra: help, completion, what a run folder holds, how a process ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import SHORT, call, messages

from mlframework.cli import evaluate, train
from mlframework.cli.command_line import command, job
from mlframework.errors import FailedRun
from mlframework.runs.run_folder import PARTS

CONF = Path(__file__).parents[1] / "conf"


def options(group: str) -> str:
    return f"{group}: {', '.join(sorted(path.stem for path in (CONF / group).glob('*.yaml')))}\n"


def test_help_shows_groups_options_examples_and_how_to_add_ones_own(tmp_path):
    said = call(train.main, "--help", folder=tmp_path)
    assert said.exit_code == 0
    for group in (
        "task",
        "algorithm/update",
        "algorithm/meta_gradient",
        "launcher",
        "sweep",
        "experiment",
    ):
        assert f"\n{options(group)}" in said.out
    assert "\nalgorithm, Meta-SVM: deep_kernel, logistic, ridge, " in said.out
    for words in ("--config-dir my_conf task=my_task", "hydra.searchpath=", "entry point", "trainer.steps=2000"):
        assert words in said.out


def test_help_of_evaluation(tmp_path):
    said = call(evaluate.main, "--help", folder=tmp_path)
    assert said.exit_code == 0
    assert "mlframework-evaluate run=runs/mine" in said.out


def test_help_is_quick(tmp_path):
    code = "import sys; sys.argv[1:] = ['--help']; from mlframework.cli.train import main\n"
    code += "try: main()\nexcept SystemExit: assert not {'torch', 'sklearn', 'matplotlib'} & {*sys.modules}, 'heavy'"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    # Time on the processor, as others may use the machine; it takes 0.7 s on a free core.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_completion_proposes_options(tmp_path):
    line = {"COMP_LINE": "mlframework-train task=si", "COMP_POINT": "25"}
    script = Path(sys.executable).with_name("mlframework-train")
    done = subprocess.run(
        [script, "-sc", "query=bash"], env={**os.environ, **line}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["task=sinusoid"]
    installed = subprocess.run([script, "-sc", "install=bash"], cwd=tmp_path, capture_output=True, text=True)
    assert "complete -o nospace -o default -F hydra_bash_completion" in installed.stdout


def test_a_run_leaves_its_folder_and_nothing_else(tmp_path):
    said = call(train.main, *SHORT, "evaluation=none", "run_dir=deep/run", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    names = {path.name for path in (tmp_path / "deep" / "run").iterdir()}
    events = {name for name in names if name.startswith("events")}
    records = {"config.yaml", "overrides.yaml", "choices.json", "environment.json", "result.json", "checkpoints"}
    assert names - events == {*records, "progress.json", "signature.json", ".lock"}
    overrides = json.loads((tmp_path / "deep" / "run" / "result.json").read_text())["overrides"]
    assert overrides == [*SHORT, "evaluation=none", "run_dir=deep/run"]


def test_evaluation_of_a_run_prints_a_table_and_writes_it_down(tmp_path):
    assert call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=tmp_path).exit_code == 0
    few = (
        "evaluation.tasks=4",
        "evaluation.validation_tasks=2",
        "+evaluation.baseline.from_scratch.tasks=2",
        "+evaluation.baseline.from_scratch.steps=2",
    )
    said = call(evaluate.main, "run=run", *few, folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert "test tasks (seed 0, hash " in said.out
    methods = [row["method"] for row in json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]]
    assert methods == ["maml", "from scratch", "scikit-learn KernelRidge"]  # the baselines of the run


def test_an_evaluation_has_the_baselines_that_are_named(tmp_path):
    assert call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=tmp_path).exit_code == 0
    named = ("evaluation/baseline=[scikit_learn]", "evaluation.tasks=4", "evaluation.validation_tasks=2")
    assert call(evaluate.main, "run=run", *named, folder=tmp_path).exit_code == 0
    methods = [row["method"] for row in json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]]
    assert methods == ["maml", "scikit-learn KernelRidge"]


def test_every_evaluation_of_a_run_is_kept(tmp_path):
    assert call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=tmp_path).exit_code == 0
    few = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "evaluation/baseline=[]")
    for number, seed in enumerate((5, 6), start=1):
        said = call(evaluate.main, "run=run", *few, f"evaluation.seed={seed}", folder=tmp_path)
        assert said.exit_code == 0, said.err
        assert said.out.splitlines()[-1] == f"written to run/evaluations/{number}.json"
    seeds = [json.loads((tmp_path / "run" / "evaluations" / f"{n}.json").read_text())["seed"] for n in (1, 2)]
    latest = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (seeds, latest["seed"]) == ([5, 6], 6)
    assert latest["overrides"] == ["run=run", *few, "evaluation.seed=6"]


def test_an_evaluation_that_cannot_be_written_is_shown(tmp_path):
    assert call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=tmp_path).exit_code == 0
    (tmp_path / "run" / "evaluations").touch()
    few = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "evaluation/baseline=[]")
    said = call(evaluate.main, "run=run", *few, folder=tmp_path)
    assert (said.exit_code, said.err.count("\n")) == (75, 1)
    assert "test tasks (seed 0, hash " in said.out and "maml" in said.out


def test_the_evaluation_of_a_training_is_shown_before_it_is_written(tmp_path):
    few = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "evaluation/baseline=[]")
    (tmp_path / "run" / "result.json").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    said = call(train.main, *SHORT, *few, "run_dir=run", folder=tmp_path)
    assert said.exit_code == 75
    assert "test tasks (seed 0, hash " in said.out


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (FailedRun("the loss is not finite"), 1, "the loss is not finite\n"),
        (
            OSError(28, "No space left on device", "run/last.pt"),
            75,
            "run/last.pt: cannot be written (No space left on device)",
        ),
        (KeyError("gone"), 1, "KeyError: 'gone' ("),
        (RuntimeError("of two\nlines"), 1, "RuntimeError: of two lines ("),
    ],
)
def test_any_error_ends_in_one_line_and_its_exit_code(tmp_path, error, exit_code, line):
    @job(settings=train.SETTINGS, required=PARTS, others=train.OTHERS)
    def failing(config):
        raise error

    said = call(command(failing, config_name="train"), folder=tmp_path)
    assert (said.exit_code, said.out, said.err.count("\n")) == (exit_code, "", 1)
    assert said.err.startswith(line)


def test_an_interrupted_command_ends_as_one_that_was(tmp_path):
    @job(settings=train.SETTINGS, required=PARTS, others=train.OTHERS)
    def interrupted(config):
        raise KeyboardInterrupt

    said = call(command(interrupted, config_name="train"), folder=tmp_path)
    assert (said.exit_code, said.err) == (130, "interrupted\n")


def test_ctrl_c_stops_a_training_that_can_be_resumed(tmp_path):
    short = [each for each in SHORT if not each.startswith("trainer.steps")]
    # Whoever runs the tests in the background may have had Ctrl-C ignored, which children inherit.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    program = str(Path(sys.executable).with_name("mlframework-train"))
    start = [sys.executable, "-c", heeding, program, *short, "evaluation=none", "run_dir=run"]
    with subprocess.Popen(
        [*start, "trainer.steps=100000", "schedule=constant"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(2)
        _, err = process.communicate(timeout=60)
    goes_on = "mlframework-train run_dir=run resume=true goes on"
    assert (process.returncode, messages(err).splitlines()[-2:]) == (130, [goes_on, "interrupted"])
    done = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["progress"]["step"]
    said = call(train.main, "run_dir=run", "resume=true", f"trainer.steps={done + 2}", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == done + 2
