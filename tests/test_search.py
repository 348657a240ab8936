"""Searches: a study that goes on, that several processes share, and that asks for nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import call
from omegaconf import OmegaConf
from test_sweep import SMALL, table

from mlframework.cli import train
from mlframework.runs.run_folder import locked_file
from mlframework.runs.search import LOCKS, OptunaSweeper, Space
from mlframework.runs.sweep_table import JobRow

optuna = pytest.importorskip("optuna", minversion="4")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

GRID = ("hydra.sweeper.params=null", "hydra.sweeper.sampler._target_=optuna.samplers.GridSampler")


def search(folder: Path, *typed: str):
    command = ("-m", f"hydra.sweep.dir={folder}", "sweep=optuna", "task=sinusoid", *SMALL, *typed)
    return call(train.main, *command, folder=folder.parent)


def studies(folder: Path) -> list[optuna.Study]:
    """The studies in a sweep's folder, the newest last."""
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]


def trials(folder: Path) -> list[tuple[dict, str, float | None]]:
    return [(trial.params, trial.state.name, trial.value) for trial in studies(folder)[-1].trials]


def test_a_search_ends_with_its_best_parameters_and_survives_trials_that_fail(tmp_path):
    folder = tmp_path / "sweep"
    said = search(folder, *GRID, "hydra.sweeper.n_trials=6", "algorithm.update.lr=choice(-1.0,0.01,1e30)")
    best = OmegaConf.load(folder / "optimization_results.yaml")
    finished = [row for row in table(folder) if row["status"] == "finished"]
    assert said.exit_code == 1
    assert {row["status"] for row in table(folder)} == {"finished", "failed", "diverged"}
    assert best.best_value == min(float(row["validation"]) for row in finished)
    assert best.best_params["algorithm.update.lr"] == 0.01
    assert "Best parameters: {" in said.out
    found = trials(folder)
    assert len(found) == 3
    for params, state, value in found:
        worked = params["algorithm.update.lr"] == 0.01
        assert (state, value is not None) == ("COMPLETE" if worked else "FAIL", worked)


def test_a_search_in_which_every_trial_fails_still_ends_with_its_table(tmp_path):
    said = search(tmp_path / "sweep", "hydra.sweeper.n_trials=2", "task.k_shot=0")
    assert said.exit_code == 1
    assert "Traceback" not in said.err
    assert {row["status"] for row in table(tmp_path / "sweep")} == {"failed"}
    assert "no trial has finished" in said.out


RATES = ("algorithm.update.lr=tag(log,interval(0.001,0.1))", "algorithm.inner_steps=1")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A search of four trials at once, and its trials."""
    folder = tmp_path_factory.mktemp("four") / "sweep"
    said = search(folder, *RATES, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1")
    assert said.exit_code == 0, said.err
    return folder, trials(folder)


def test_a_search_goes_on_as_if_it_had_not_been_stopped(four, tmp_path):
    folder = tmp_path / "sweep"
    first = search(folder, *RATES, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1")
    assert first.exit_code == 0, first.err
    assert len(trials(folder)) == 2
    said = search(folder, *RATES, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1")
    assert said.err.count("step 2: validation") == 2
    assert trials(folder) == four[1]
    assert len({params["algorithm.update.lr"] for params, _, _ in four[1]}) == 4


def test_a_search_that_has_its_trials_asks_for_none(four):
    before = trials(four[0])
    said = search(four[0], *RATES, "hydra.sweeper.n_trials=4")
    assert (said.exit_code, said.err.count("validation"), trials(four[0])) == (0, 0, before)
    assert "Best value: " in said.out


def killed(folder: Path) -> int:
    """Makes the last trial of a finished search one that was killed: its number."""
    (study,) = studies(folder)
    trial = study.ask(study.trials[-1].distributions)
    return trial.number


def test_a_trial_of_a_killed_process_is_run_to_its_end(tmp_path):
    folder, typed = tmp_path / "sweep", (*RATES, "hydra.sweeper.n_jobs=1")
    assert search(folder, *typed, "hydra.sweeper.n_trials=1").exit_code == 0
    number = killed(folder)
    said = search(folder, *typed, "hydra.sweeper.n_trials=2")
    assert said.exit_code == 0, said.err
    found = studies(folder)[0].trials
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 2
    rates = {trial.params["algorithm.update.lr"] for trial in found}
    assert {float(row["algorithm.update.lr"]) for row in table(folder)} == rates
    assert found[number].params["algorithm.update.lr"] in rates


def test_a_trial_of_another_process_is_left_to_it(tmp_path):
    folder, typed = tmp_path / "sweep", (*RATES, "hydra.sweeper.n_jobs=1")
    assert search(folder, *typed, "hydra.sweeper.n_trials=1").exit_code == 0
    number = killed(folder)
    with locked_file(folder / LOCKS / str(number)):
        said = search(folder, *typed, "hydra.sweeper.n_trials=3")
    assert said.exit_code == 0, said.err
    states = [trial.state.name for trial in studies(folder)[0].trials]
    assert states == ["COMPLETE", "RUNNING", "COMPLETE"]


def test_one_value_more_is_another_study_that_begins_with_the_jobs_that_ran(tmp_path):
    folder = tmp_path / "sweep"
    random = "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler"
    typed = ("algorithm.inner_steps=1", "hydra.sweeper.n_jobs=1", random)
    first = search(folder, *typed, "algorithm.update.lr=choice(0.01,0.02)", "hydra.sweeper.n_trials=3")
    assert first.exit_code == 0, first.err
    ran = {float(row["algorithm.update.lr"]): float(row["validation"]) for row in table(folder)}
    said = search(folder, *typed, "algorithm.update.lr=choice(0.01,0.02,0.03)", "hydra.sweeper.n_trials=3")
    assert said.exit_code == 0, said.err
    taken = trials(folder)[: len(ran)]
    assert {params["algorithm.update.lr"]: value for params, _, value in taken} == ran
    assert len(trials(folder)) == 3 and len(studies(folder)) == 2


def test_a_grid_has_each_combination_once(tmp_path):
    folder = tmp_path / "sweep"
    typed = ("algorithm.update.lr=0.01,0.02", "seed=range(3)")
    said = search(folder, *GRID, *typed, "hydra.sweeper.n_jobs=4")
    assert said.exit_code == 0, said.err
    rows = table(folder, "sweep_jobs.csv")
    assert sorted((row["algorithm.update.lr"], row["seed"]) for row in rows) == [
        (rate, seed) for rate in ("0.01", "0.02") for seed in ("0", "1", "2")
    ]
    assert len(trials(folder)) == 6


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ((*GRID, "optimizer.lr=interval(0,1)"), "optimizer.lr: a grid needs choices, as in optimizer.lr=1,2,5"),
        (("hydra.sweeper.params=null",), "sweep=optuna: nothing to search: give a key several values"),
        (("hydra.sweeper.n_trials=0",), "hydra.sweeper.n_trials=0: must be a whole number of at least 1"),
        (("hydra.sweeper.n_jobs=0",), "hydra.sweeper.n_jobs=0: must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_a_wrong_search_is_one_line(tmp_path, typed, line):
    said = search(tmp_path / "sweep", *typed)
    assert said.exit_code == 2
    assert said.err.startswith(line) and len(said.err.splitlines()) == 1


def space(*typed: str) -> Space:
    sweeper = OptunaSweeper("minimize", 1, 1, "", None, None)
    sweeper.loader = None
    return sweeper.space(typed)


@pytest.mark.parametrize(
    ("typed", "distribution"),
    [
        ("interval(0.0,1.0)", FloatDistribution(0.0, 1.0)),
        ("interval(1,8)", FloatDistribution(1.0, 8.0)),
        ("int(interval(1,8))", IntDistribution(1, 8)),
        ("tag(log,interval(1e-4,0.1))", FloatDistribution(1e-4, 0.1, log=True)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(1,8,2)", IntDistribution(1, 7, step=2)),
        ("range(0.5,1.5,0.5)", CategoricalDistribution([0.5, 1.0])),
        ("1,2,x", CategoricalDistribution([1, 2, "x"])),
        ("true,null", CategoricalDistribution([True, None])),
        ("[40,40],[80]", CategoricalDistribution(["[40,40]", "[80]"])),
    ],
    ids=str,
)
def test_what_is_typed_is_the_distribution(typed, distribution):
    found = space("fixed=1", f"a.b={typed}", "sweep=optuna")
    assert found.distributions == {"a.b": distribution}
    assert found.fixed == ["fixed=1", "sweep=optuna"]


def test_a_choice_is_typed_as_the_user_typed_it():
    found = space("base_layer.hidden=[40,40],[80]", "optimizer.lr=0.1,0.2", "seed=0")
    overrides = found.overrides({"base_layer.hidden": "[80]", "optimizer.lr": 0.2})
    assert overrides == ("seed=0", "base_layer.hidden=[80]", "optimizer.lr=0.2")


@pytest.mark.parametrize(
    ("overrides", "params"),
    [
        ({"seed": "0", "lr": "0.1", "n": "3"}, {"lr": 0.1, "n": 3}),
        ({"n": "3", "lr": "1e-1", "seed": "0"}, {"lr": 0.1, "n": 3}),
        ({"seed": "0", "lr": "0.3", "n": "3"}, None),
        ({"seed": "1", "lr": "0.1", "n": "3"}, None),
        ({"lr": "0.1", "n": "3"}, None),
        ({"seed": "0", "lr": "0.1", "n": "3", "more": "1"}, None),
    ],
    ids=str,
)
def test_a_job_that_ran_is_a_trial_if_it_lies_in_the_space(overrides, params):
    found = space("seed=0", "launcher=joblib", "lr=0.1,0.2", "n=interval(1,5)")
    assert found.params(JobRow("job", "finished", overrides)) == params
