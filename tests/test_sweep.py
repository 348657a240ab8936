"""Sweeps: every job as if it ran alone, a table at the end, failures that stay with their job, nothing done twice."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest
import yaml
from commands import SHORT, call
from faults import read_only_folder
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from scipy import stats

from mlframework.cli import private, table as table_command, train
from mlframework.cli.private import SweepLoader
from mlframework.errors import InvalidValue
from mlframework.runs.launchers.launcher import JobLauncher
from mlframework.runs.launchers.with_ray import RayLauncher
from mlframework.runs.launchers.with_submitit import SlurmLauncher
from mlframework.runs.overrides import job_name
from mlframework.runs.run_folder import RunFolder, locked_folder
from mlframework.runs.sweep import direction
from mlframework.runs.sweep_figure import sweep_figure
from mlframework.runs.sweep_report import write_sweep
from mlframework.runs.sweep_table import JobRow, grouped, read_rows
from mlframework.screen import Screen

CONF = Path(__file__).parents[1] / "conf"
#: One thread, as the workers of joblib have: other threads add up in another order.
SMALL = (*SHORT, "threads=1", "evaluation=none", "base_layer=mlp", "base_layer.hidden=[8]")
EIGHT = ("algorithm=maml,fomaml,anil,reptile", "task=sinusoid,glyphs")
#: An evaluation of a moment.
TESTED = ("evaluation=default", "evaluation.tasks=5", "evaluation.validation_tasks=4", "evaluation/baseline=[]")


def sweep(folder: Path, *typed: str):
    return call(train.main, "-m", f"hydra.sweep.dir={folder}", *SMALL, *typed, folder=folder.parent)


def results(folder: Path) -> dict[tuple[str, ...], dict]:
    """What every job came to, by what made it differ."""
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        choices = result["choices"]
        found[choices["algorithm"], choices["task"]] = {k: result[k] for k in ("status", "monitor", "validation")}
    return found


def table(folder: Path, name: str = "sweep.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def job(folder: Path, **settings: str) -> Path:
    """The folder of the one job with these settings."""
    (found,) = (row for row in read_rows(folder) if settings.items() <= row.overrides.items())
    return folder / found.job


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Four algorithms on two tasks, one after another in this process."""
    folder = tmp_path_factory.mktemp("basic") / "sweep"
    return folder, sweep(folder, *EIGHT)


def test_every_combination_runs_and_stands_in_the_table(eight):
    folder, said = eight
    assert said.exit_code == 0, said.err
    rows = table(folder)
    assert [(row["algorithm"], row["task"]) for row in rows] == [
        (algorithm, task) for algorithm in ("maml", "fomaml", "anil", "reptile") for task in ("sinusoid", "glyphs")
    ]
    assert {row["metric"] for row in rows if row["task"] == "glyphs"} == {"query_accuracy"}
    for row in rows:
        interval = json.loads((folder / row["job"] / "result.json").read_text())["validation"][row["metric"]]
        found = float(row["validation"]), float(row["validation_half_width"])
        assert found == (interval["mean"], interval["half_width"])
        assert (row["test"], row["status"], row["trainer.steps"]) == ("", "finished", "2")
        assert float(row["seconds"]) > 0
        assert re.search(rf"{row['job'][-8:]} │ {row['algorithm']} +│ {row['task']}", said.out)


def test_a_jobs_folder_is_named_by_what_was_asked_for(eight):
    for row in table(eight[0]):
        assert row["job"].startswith(f"{row['algorithm']}-{row['task']}-")
        assert row["job"] == job_name(RunFolder(eight[0] / row["job"]).overrides())


def test_the_test_metric_stands_beside_the_validation_metric(tmp_path):
    steep = "algorithm.update.lr=0.5"  # the last inner step is not the best
    said = sweep(tmp_path / "sweep", "task=sinusoid", "optimizer.lr=0.1,0.2", steep, *TESTED)
    assert said.exit_code == 0, said.err
    for row in table(tmp_path / "sweep"):
        result = json.loads((tmp_path / "sweep" / row["job"] / "result.json").read_text())
        ours = result["evaluation"]["rows"][0]
        assert ours["chosen"] != ours["steps"][-1]
        interval = ours["metrics"]["query_loss"][ours["steps"].index(ours["chosen"])]
        assert (float(row["test"]), float(row["test_half_width"])) == (interval["mean"], interval["half_width"])
        assert float(row["validation"]) == result["validation"]["query_loss"]["mean"] != float(row["test"])
    assert re.search(r"validation +┃ +test ┃", said.out)


def test_a_sweep_keeps_no_config_of_a_job_that_has_ended(tmp_path, monkeypatch):
    """A sweep of thousands of jobs holds the results of all: each with its configs would take 0.3 MB."""
    ended = []
    launch = JobLauncher.launch
    monkeypatch.setattr(
        JobLauncher, "launch", lambda *args, **named: ended.extend(found := launch(*args, **named)) or found
    )
    sweep(tmp_path / "sweep", "trainer.steps=-1,-2")  # they fail at once
    assert [[o for o in job.overrides if "-" in o] for job in ended] == [["trainer.steps=-1"], ["trainer.steps=-2"]]
    assert all(len(pickle.dumps(job)) < 5000 for job in ended)


def test_the_screen_counts_the_jobs_that_have_ended(tmp_path, monkeypatch):
    told, tell = [], JobLauncher.tell
    monkeypatch.setattr(JobLauncher, "tell", lambda self: told.append(tell(self) or Screen.current.idle))
    sweep(tmp_path / "sweep", "trainer.steps=-1,-2")  # they fail at once
    assert told == [f"sweep in {tmp_path / 'sweep'}: {n} of 2 jobs have ended" for n in range(3)]


#: Settings of a job, of every kind that Hydra tells apart.
TYPED = [
    ["seed=1"],
    ["seed=2", "task=sinusoid", "task.k_shot=3"],
    ["task=omniglot", "evaluation/baseline=[]", "algorithm/update=adam"],
    ["+display=samples", "~evaluation.baseline.from_scratch"],
    ["~schedule", "~allocator", "optimizer={lr:0.1}", "trainer={steps:3,log_every:1}"],
    ["experiment=sinusoid_shots", "+note={a:[1,2]}", "++seed=4"],
]


def test_jobs_with_the_same_options_read_their_files_once_and_are_composed_as_hydra_does():
    def loaders():
        with initialize_config_module("mlframework.conf", version_base="1.3"):
            path = GlobalHydra.instance().config_loader().get_search_path()
            return SweepLoader(path), ConfigLoaderImpl(path)

    ours, hydras = loaders()
    sweep_config = hydras.load_configuration("train", ["hydra.sweep.dir=a"], RunMode.MULTIRUN)
    SweepLoader.composed.clear()
    for typed in TYPED * 2:  # the second time from what is remembered, which the first must have left as it was
        found, expected = (loader.load_sweep_config(sweep_config, list(typed)) for loader in (ours, hydras))
        for value in ("seed", "hydra"):
            assert found[value] == expected[value]
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
    assert len(SweepLoader.composed) == len(TYPED)


def test_before_a_sweep_jobs_that_differ_in_numbers_are_composed_once(tmp_path, monkeypatch):
    composed, original = [], SweepLoader.load_sweep_config

    def noted(self, config, overrides):
        composed.append([override for override in overrides if override.startswith(("algorithm", "seed"))])
        return original(self, config, overrides)

    monkeypatch.setattr(SweepLoader, "load_sweep_config", noted)
    sweep(tmp_path / "sweep", "algorithm=maml,anil", "seed=0,1", "trainer.steps=-1")  # they fail at once
    jobs = [[f"algorithm={name}", f"seed={seed}"] for name in ("maml", "anil") for seed in (0, 1)]
    assert composed == [jobs[2], jobs[0], *jobs]


def test_a_sweep_over_many_options_remembers_few_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(private, "MOST_COMPOSED", 2)
    sweep(tmp_path / "sweep", "algorithm=maml,fomaml,anil,reptile", "trainer.steps=-1")  # they fail at once
    assert len(SweepLoader.composed) == 2


@pytest.mark.slow
def test_joblib_gives_the_same_table(eight, tmp_path):
    said = sweep(tmp_path / "sweep", "launcher=joblib", "hydra.launcher.n_jobs=2", *EIGHT)
    assert said.exit_code == 0, said.err
    assert results(tmp_path / "sweep") == results(eight[0])


@pytest.mark.parametrize("job", [("anil", "sinusoid"), ("reptile", "glyphs")])
def test_a_job_of_a_sweep_gives_the_numbers_of_the_same_job_alone(eight, tmp_path, job):
    algorithm, task = job
    said = call(train.main, *SMALL, f"algorithm={algorithm}", f"task={task}", "run_dir=run", folder=tmp_path)
    assert said.exit_code == 0, said.err
    alone = json.loads((tmp_path / "run" / "result.json").read_text())
    assert alone["validation"] == results(eight[0])[job]["validation"]


def test_a_job_of_a_sweep_can_be_resumed_by_itself(eight, tmp_path):
    folder, original = tmp_path / "job", job(eight[0], algorithm="fomaml", task="sinusoid")
    assert RunFolder(original).config().run_dir == str(original)
    shutil.copytree(original, folder)
    said = call(train.main, f"run_dir={folder}", "resume=true", "trainer.steps=4", "schedule.T_max=2", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert json.loads((folder / "result.json").read_text())["step"] == 4


@pytest.mark.parametrize("typed", [[], ["resume=true"]], ids=str)
def test_an_interrupted_sweep_goes_on(tmp_path, typed):
    folder, meta_batches = tmp_path / "sweep", ("task=sinusoid", "trainer.meta_batch=2,3,4")
    whole = sweep(folder, *meta_batches)
    assert whole.exit_code == 0, whole.err
    before = table(folder)
    finished, cut_off, never_started = (folder / row["job"] for row in before)
    written = (finished / "result.json").stat().st_mtime_ns
    (cut_off / "result.json").unlink()
    shutil.rmtree(never_started)
    assert [row.status for row in read_rows(folder)] == ["finished", "interrupted", "not started"]

    said = sweep(folder, *meta_batches, *typed)
    assert said.exit_code == 0, said.err
    assert f"{finished}: finished before" in said.out and f"{cut_off}: finished before" not in said.out
    assert (finished / "result.json").stat().st_mtime_ns == written
    # What was cut off had been trained: only what never started trains.
    assert said.err.count("validation query_loss") * 3 == whole.err.count("validation query_loss") > 0
    assert [row | {"seconds": ""} for row in table(folder)] == [row | {"seconds": ""} for row in before]


def kept(folder: Path) -> dict[Path, bytes]:
    """What the jobs of a sweep came to."""
    return {path: path.read_bytes() for path in folder.glob("*/*.json")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished sweep of two jobs, and what it holds."""
    folder = tmp_path_factory.mktemp("two") / "sweep"
    assert sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2").exit_code == 0
    assert [row["status"] for row in table(folder)] == ["finished", "finished"]
    return folder, kept(folder)


@pytest.mark.parametrize(
    ("typed", "rates"),
    [
        (["optimizer.lr=0.1,0.2"], ["0.1", "0.2"]),
        (["optimizer.lr=0.2,1e-1", "launcher=joblib"], ["0.2", "0.1"]),
        (["optimizer.lr=0.3,0.1"], ["0.3", "0.1", "0.2"]),
        (["optimizer.lr=0.3", "seed=0"], ["0.3", "0.1", "0.2"]),
    ],
    ids=str,
)
def test_the_same_sweep_with_other_values_runs_what_is_missing(two, tmp_path, typed, rates):
    folder = tmp_path / "sweep"
    shutil.copytree(two[0], folder)
    before = kept(folder)
    said = sweep(folder, "task=sinusoid", *typed)
    assert said.exit_code == 0, said.err
    assert said.err.count("step 2: validation") == len(rates) - 2
    assert before.items() <= kept(folder).items()
    assert [(row["optimizer.lr"], row["status"]) for row in table(folder)] == [(rate, "finished") for rate in rates]


def test_numbered_folders_of_an_older_version_are_known(two, tmp_path):
    folder = tmp_path / "sweep"
    for number, row in enumerate(read_rows(two[0])):
        shutil.copytree(two[0] / row.job, folder / str(number))
    said = sweep(folder, "task=sinusoid", "optimizer.lr=0.2,0.1,0.3")
    assert said.exit_code == 0, said.err
    assert [row["job"][:1] for row in table(folder)] == ["1", "0", "s"]


def test_two_jobs_of_one_folder_are_refused_and_the_first_is_kept(tmp_path):
    folder = tmp_path / "sweep"
    said = sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2", "hydra.sweep.subdir=one")
    assert said.exit_code == 1
    assert "holds a run already" in said.err
    assert [(row["optimizer.lr"], row["status"]) for row in table(folder)] == [
        ("0.1", "finished"),
        ("0.2", "not started"),
    ]
    assert not (folder / "one" / "failed.json").exists()


def test_a_finished_job_whose_defaults_have_changed_says_so(two, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(two[0], folder)
    path = job(folder, **{"optimizer.lr": "0.1"}) / "config.yaml"
    path.write_text(path.read_text().replace("k_query: 10", "k_query: 5"))
    said = sweep(folder, "task=sinusoid", "optimizer.lr=0.1")
    assert said.exit_code == 0
    assert re.search(r"runs with task.k_query=5, which is 10 now", said.err)


HOLD = """
import sys
from pathlib import Path
from pydoc import locate
from mlframework.runs.run_folder import locked_folder
lock = locked_folder("", Path(sys.argv[1]), "")
print("held", flush=True)
while len(list(Path(sys.argv[1]).parent.glob("*/result.json"))) < 1:
    pass
"""


def test_a_job_that_another_process_runs_comes_last_and_is_waited_for(tmp_path):
    folder = tmp_path / "sweep"
    taken = folder / job_name([*SMALL, "task=sinusoid", "optimizer.lr=0.1"])
    with subprocess.Popen([sys.executable, "-c", HOLD, str(taken)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert [row.status for row in read_rows(folder)] == []
        said = sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2")
    assert said.exit_code == 0, said.err
    assert [row["status"] for row in table(folder)] == ["finished", "finished"]
    first, second = (job(folder, **{"optimizer.lr": rate}) / "result.json" for rate in ("0.2", "0.1"))
    assert first.stat().st_mtime_ns < second.stat().st_mtime_ns


def test_a_job_that_runs_is_called_running(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "sweep")
    taken = job(tmp_path / "sweep", **{"optimizer.lr": "0.1"})
    (taken / "result.json").unlink()
    with locked_folder("", taken, ""):
        assert [row.status for row in read_rows(tmp_path / "sweep")] == ["running", "finished"]
    assert [row.status for row in read_rows(tmp_path / "sweep")] == ["interrupted", "finished"]


def test_a_job_that_failed_before_runs_again_and_its_failure_is_gone(two, tmp_path):
    folder, base = tmp_path / "sweep", tmp_path / "base"
    typed = ("task=sinusoid", "optimizer.lr=0.1", f"init={base}")
    assert sweep(folder, *typed).exit_code == 1
    (failed,) = folder.glob("*/failed.json")
    assert [(row["status"], row["error"]) for row in table(folder)] == [
        ("failed", json.loads(failed.read_text())["error"])
    ]
    shutil.copytree(two[0] / read_rows(two[0])[0].job, base)
    said = sweep(folder, *typed)
    assert said.exit_code == 0, said.err
    assert [row["status"] for row in table(folder)] == ["finished"]
    assert not failed.exists()


def test_a_job_that_diverged_is_not_tried_again(tmp_path):
    folder, typed = tmp_path / "sweep", ("task=sinusoid", "algorithm.update.lr=1e30")
    first = sweep(folder, *typed)
    before, (checkpoint,) = table(folder), folder.glob("*/checkpoints/last.pt")
    written = checkpoint.stat().st_mtime_ns
    assert "not finite" in first.err and "again" not in first.err
    said = sweep(folder, *typed)
    assert said.exit_code == 1
    assert "the same job would end so again: delete its folder to try it anew" in said.err
    assert table(folder) == before and before[0]["status"] == "diverged"
    assert checkpoint.stat().st_mtime_ns == written


#: A finished job's record, whose metric is a word.
WORD = (
    '{"status": "finished", "overrides": [], "monitor": "a", "seconds": 1,'
    ' "validation": {"a": {"mean": "low", "half_width": 1}}}'
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\0",
        '{"status": "finished"}',
        '{"status": 1, "overrides": [1], "monitor": []}',
        WORD,
        WORD.replace("low", "0.5"),
    ],
)
@pytest.mark.parametrize("name", ["result.json", "failed.json"])
def test_a_damaged_record_is_one_row(two, tmp_path, name, text):
    shutil.copytree(two[0], tmp_path / "sweep")
    damaged = job(tmp_path / "sweep", **{"optimizer.lr": "0.2"}) / name
    damaged.write_text(text)
    rows = read_rows(tmp_path / "sweep")
    assert [(row.status, row.overrides["optimizer.lr"]) for row in rows] == [("finished", "0.1"), ("damaged", "0.2")]
    assert rows[1].error == f"damaged: {damaged}"


def test_a_sweep_with_a_damaged_record_ends_with_its_table(two, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(two[0], folder)
    damaged = job(folder, **{"optimizer.lr": "0.2"})
    (damaged / "result.json").write_text("{")
    said = sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2")
    assert said.exit_code == 1
    assert "Traceback" not in said.err
    assert [row["status"] for row in table(folder)] == ["finished", "damaged"]
    assert f"\njob {damaged.name}: damaged: {damaged / 'result.json'}\n" in said.out


@pytest.mark.parametrize("launcher", ["", "launcher=joblib"])
def test_a_job_that_fails_ends_neither_the_others_nor_in_silence(tmp_path, launcher):
    said = sweep(tmp_path / "sweep", "task.k_shot=0,5", "algorithm.update.lr=0.01,1e30", *filter(None, [launcher]))
    assert said.exit_code == 1
    rows = table(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["failed", "failed", "finished", "diverged"]
    assert f"\njob {rows[0]['job']}: task.k_shot=0: must be " in said.out
    assert f"\njob {rows[3]['job']}: step 1: the meta-loss is not finite (task " in said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "sweep" / rows[0]["job"] / "config.yaml").exists()


def test_a_job_that_was_killed_is_called_interrupted(tmp_path):
    RunFolder(tmp_path / "0").path.mkdir()
    (tmp_path / "0" / "config.yaml").touch()
    assert [(row.job, row.status) for row in read_rows(tmp_path)] == [("0", "interrupted")]


def test_a_sweep_over_options_that_do_not_exist_starts_no_job(tmp_path):
    said = sweep(tmp_path / "sweep", "algorithm=maml,mamal")
    assert (said.exit_code, said.err.splitlines()[-1].partition(";")[0]) == (
        2,
        "algorithm=mamal: no such option (did you mean maml?)",
    )
    assert not list((tmp_path / "sweep").glob("*/*"))


def test_all_options_of_a_group_can_be_swept(tmp_path):
    said = sweep(tmp_path / "sweep", "schedule=glob(*)")
    assert [row["schedule"] for row in table(tmp_path / "sweep")] == ["constant", "cosine", "linear"], said.err


def test_seeds_become_one_row_with_the_interval_over_seeds(tmp_path):
    said = sweep(tmp_path / "sweep", "seed=0,1,2", "algorithm=maml,anil")
    assert said.exit_code == 0, said.err
    rows = table(tmp_path / "sweep")
    assert [(row["algorithm"], row["seed"]) for row in rows] == [("maml", "0,1,2"), ("anil", "0,1,2")]
    means = [row.validation for row in read_rows(tmp_path / "sweep") if row.overrides["algorithm"] == "maml"]
    low, high = stats.t.interval(0.95, 2, loc=stats.tmean(means), scale=stats.sem(means))
    assert float(rows[0]["validation"]) == pytest.approx((low + high) / 2)
    assert float(rows[0]["validation_half_width"]) == pytest.approx((high - low) / 2)
    assert "interval over seeds" in said.out
    assert len((tmp_path / "sweep" / "sweep_jobs.csv").read_text().splitlines()) == 7


def test_a_group_of_seeds_says_how_many_finished():
    rows = [
        JobRow("0", "finished", {"seed": "0"}, "query_loss", 1.0, 0.1, 5.0, 0.1, 2.0),
        JobRow("1", "failed", {"seed": "1"}, error="no"),
        JobRow("2", "finished", {"seed": "2"}, "query_loss", 3.0, 0.1, 6.0, 0.1, 2.0),
    ]
    (row,) = grouped(rows)
    assert (row.job, row.status, row.error) == ("0,1,2", "2 of 3 finished", "no")
    assert (row.validation, row.test, row.seconds) == (2.0, 5.5, 4.0)
    low, high = stats.t.interval(0.95, 1, loc=5.5, scale=stats.sem([5.0, 6.0]))
    assert row.test_half_width == pytest.approx((high - low) / 2)


def test_a_seed_without_a_finite_value_leaves_no_mean_and_one_seed_no_interval():
    diverged = JobRow("0", "finished", {"seed": "0"}, "query_loss", seconds=2.0)
    reached = JobRow("1", "finished", {"seed": "1"}, "query_loss", 1.0, 0.1, seconds=2.0)
    failed = JobRow("2", "failed", {"seed": "2"}, error="no")
    assert [row[4:6] for row in grouped([diverged, reached])] == [(None, None)]
    assert [row[4:6] for row in grouped([reached, failed])] == [(1.0, None)]


def test_a_result_of_a_single_validation_task_is_shown_without_an_interval(tmp_path):
    said = sweep(tmp_path / "sweep", "algorithm=maml,anil", "trainer.validation_tasks=1")
    assert said.exit_code == 0, said.err
    assert [row["validation_half_width"] for row in table(tmp_path / "sweep")] == ["", ""]
    assert "nan" not in said.out and "±" not in said.out.replace("mean ±", "")


def test_a_single_seed_keeps_its_interval_over_tasks():
    rows = [JobRow("0", "finished", {"seed": "0"}, "query_loss", 1.0, 0.1, seconds=2.0)]
    assert grouped(rows) == rows


@pytest.mark.parametrize(
    ("metric", "target", "wanted"),
    [
        ("query_loss", "mlframework.tasks.Sinusoid", "minimize"),
        ("query_loss", "mlframework.tasks.Digits", "minimize"),
        ("query_accuracy", "mlframework.tasks.Digits", "maximize"),
    ],
)
def test_a_search_goes_the_way_in_which_the_metric_is_better(metric, target, wanted):
    assert direction(metric, target) == wanted


@pytest.mark.slow
def test_submitit_runs_each_job_in_a_process_of_its_own(tmp_path):
    said = sweep(tmp_path / "sweep", "launcher=submitit", "algorithm=maml,anil")
    assert said.exit_code == 0, said.err
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["finished", "finished"]


@pytest.mark.slow
def test_slurms_array_of_jobs_is_waited_for_as_submitit_runs_it_here(tmp_path, monkeypatch):
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(SlurmLauncher, "cluster", "local")  # there is no cluster
    said = sweep(tmp_path / "sweep", "launcher=slurm", "algorithm=maml,anil")
    assert said.exit_code == 0, said.err
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["finished", "finished"]


MISSING = {
    "launcher=submitit": "submitit",
    "launcher=slurm": "submitit",
    "launcher=ray": "ray",
    "sweep=optuna": "optuna",
}


@pytest.mark.parametrize("asked", MISSING)
def test_what_is_not_installed_names_the_extra(tmp_path, monkeypatch, asked):
    monkeypatch.setitem(sys.modules, MISSING[asked], None)
    said = sweep(tmp_path / "sweep", asked, "seed=0,1")
    extra = "ray" if MISSING[asked] == "ray" else "sweep"
    assert said.exit_code == 2
    assert said.err.startswith(f"{asked}: needs an extra: pip install 'mlframework[{extra}]' (")
    assert len(said.err.splitlines()) == 1
    assert not list((tmp_path / "sweep").glob("*/*"))


@pytest.mark.parametrize(("launcher", "setting"), [("submitit", "tasks_per_node=0"), ("ray", "ranks_per_job=-1")])
def test_a_number_of_a_launcher_is_refused_before_any_job(tmp_path, launcher, setting):
    said = sweep(tmp_path / "sweep", f"launcher={launcher}", "seed=0,1", f"hydra.launcher.{setting}")
    assert (said.exit_code, said.err) == (2, f"hydra.launcher.{setting}: must be at least 1\n")
    assert not list((tmp_path / "sweep").glob("*/*"))


@pytest.mark.parametrize(
    ("launcher", "name", "value", "why"),
    [
        ("submitit", "tasks_per_node", "two", "must be a whole number of at least 1"),
        ("submitit", "timeout_min", 0, "must be at least 1"),
        ("submitit", "gpus_per_node", -1, "must be at least 0"),
        ("submitit", "n_jobs", 0, "must be a whole number of at least 1, or -1 for one per core"),
        ("joblib", "n_jobs", 0, "must be a whole number of at least 1, or -1 for one per core"),
        ("joblib", "n_jobs", 1.5, "must be a whole number of at least 1, or -1 for one per core"),
        ("slurm", "slurm_array_parallelism", 0, "must be at least 1"),
        ("slurm", "mem_gb", 0, "must be at least 0.001"),
        ("ray", "cpus", 0, "must be at least 1"),
        ("ray", "cpus_per_job", 0, "must be at least 0.0001"),
        ("ray", "gpus_per_job", -0.5, "must be at least 0"),
        ("ray", "cpus_per_job", True, "must be a number of at least 0.0001"),
    ],
)
def test_every_number_of_a_launcher_is_checked(launcher, name, value, why):
    settings = yaml.safe_load((CONF / "hydra" / "launcher" / f"with_{launcher}.yaml").read_text())
    made = locate(settings.pop("_target_"))
    made(**settings)
    with pytest.raises(InvalidValue) as refused:
        made(**settings | {name: value})
    assert (refused.value.field, refused.value.value, refused.value.why) == (name, value, why)


def test_ray_refuses_a_job_for_which_this_machine_is_too_small():
    launcher = RayLauncher(None, 2, None, cpus_per_job=1, gpus_per_job=0, ranks_per_job=3)
    launcher.check_room({"CPU": 3.0})
    line = r"hydra.launcher.cpus_per_job=1: a job \(ranks_per_job=3\) needs 3 CPUs, and this machine has 2"
    with pytest.raises(InvalidValue, match=line):
        launcher.check_room({"CPU": 2.0})
    RayLauncher("auto", None, None, 1, 0, 3).check_room({"CPU": 2.0})  # a cluster may grow


def test_slurm_is_asked_for_on_a_cluster(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = sweep(tmp_path / "sweep", "launcher=slurm", "seed=0,1")
    line = "launcher=slurm: there is no sbatch here: start the sweep on a login node of the cluster\n"
    assert (said.exit_code, said.err) == (2, line)


@pytest.mark.parametrize("gone", ["sweep.csv", "plan.json", "multirun.yaml"])
def test_the_table_can_be_made_again_at_any_time(two, tmp_path, gone):
    folder = tmp_path / "sweep"
    shutil.copytree(two[0], folder)
    before = (folder / "sweep.csv").read_bytes()
    for path in (folder / gone, *folder.glob("sweep.*")):
        path.unlink(missing_ok=True)
    said = call(table_command.main, "sweep", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert (folder / "sweep.csv").read_bytes() == before
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "sweep.md").read_text()
    assert "| lr | metric | validation | test | seconds | status |" in page
    for row in read_rows(folder):
        assert f"| {row.overrides['optimizer.lr']} | query loss | " in page
        assert row.job[-8:] in said.out


def test_the_table_of_several_sweeps_names_each_job_by_its_sweep(two, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(two[0], tmp_path / "multirun" / name)
    said = call(table_command.main, "multirun", folder=tmp_path)
    assert said.exit_code == 0, said.err
    rows = table(tmp_path / "multirun")
    assert [row["job"].split("/")[0] for row in rows] == ["first", "first", "second", "second"]
    assert f"first/{rows[0]['job'][-8:]}" in said.out


def test_the_table_of_a_folder_that_cannot_be_written_to_is_printed(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "sweep")
    with read_only_folder(tmp_path / "sweep"):
        said = call(table_command.main, "sweep", folder=tmp_path)
    assert (said.exit_code, said.err) == (75, "sweep/sweep.csv: cannot be read or written (Permission denied)\n")
    assert said.out.count("finished") == 2 and "written to" not in said.out


OF_SWEEP = "must be the folder of a sweep, as in multirun/mine"


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("nowhere", "nowhere: there is no such folder, looked for at {here}/nowhere: " + OF_SWEEP),
        ("file", f"file: is a file: {OF_SWEEP}"),
        ("folder=.", "folder=.: this command takes the folder alone: mlframework-table ."),
        (".", ".: holds no job of a sweep"),
    ],
)
def test_a_table_of_nothing_is_one_line(tmp_path, folder, line):
    (tmp_path / "file").touch()
    said = call(table_command.main, folder, folder=tmp_path)
    assert (said.exit_code, said.out, said.err) == (2, "", f"{line.format(here=tmp_path)}\n")


def test_failures_and_jobs_to_come_stand_in_the_page(tmp_path):
    done = {"status": "failed", "overrides": ["task.k_shot=0"], "error": "task.k_shot=0: must be | at least 1"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "failed.json").write_text(json.dumps(done))
    (tmp_path / "plan.json").write_text(json.dumps([["task.k_shot=1"], ["task.k_shot=0"]]))
    rows = read_rows(tmp_path)
    write_sweep(tmp_path, rows)
    assert [(row.overrides["task.k_shot"], row.status) for row in rows] == [("1", "not started"), ("0", "failed")]
    page = (tmp_path / "sweep.md").read_text()
    assert "| 1 |  |  |  |  | not started |\n| 0 |  |  |  |  | failed |" in page
    assert "* job a: task.k_shot=0: must be | at least 1\n* 1 not started: the same command starts them" in page


def rows_of(key: str, values: list[str], means: list[float]) -> list[JobRow]:
    return [
        JobRow(value, "finished", {key: value, "algorithm": name}, "query_loss", 9.0, 0.5, mean, 0.1, 1.0)
        for name in ("maml", "anil")
        for value, mean in zip(values, means, strict=True)
    ]


def test_the_plot_draws_a_number_that_was_swept_as_an_axis():
    (axes,) = sweep_figure(rows_of("optimizer.lr", ["0.1", "0.001", "0.01"], [3.0, 1.0, 2.0])).axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("optimizer.lr", "log")
    assert axes.get_ylabel() == "test query loss"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["maml", "anil"]
    for container in axes.containers:
        line = container.lines[0]
        assert line.get_xydata().tolist() == [[0.001, 1.0], [0.01, 2.0], [0.1, 3.0]]
        assert container.lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([0.9, 1.1])


def test_the_plot_draws_other_sweeps_row_by_row():
    rows = [
        *rows_of("optimizer", ["adam", "sgd"], [1.0, 2.0]),
        JobRow("x", "failed", {"optimizer": "none"}, error="no"),
    ]
    (axes,) = sweep_figure(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["adam maml", "sgd maml", "adam anil", "sgd anil"]
    assert [container.lines[0].get_xdata()[0] for container in axes.containers] == [1.0, 2.0, 1.0, 2.0]
    assert axes.get_xlabel() == "query loss"


def test_the_plot_has_a_panel_for_each_metric_and_says_when_there_is_none(eight):
    panels = sweep_figure(read_rows(eight[0])).axes
    assert {axes.get_xlabel() for axes in panels} == {"query loss", "query accuracy"}
    (axes,) = sweep_figure([JobRow("0", "failed", {}, error="no")]).axes
    assert [text.get_text() for text in axes.texts] == ["no job has finished"]


def test_slurm_gets_its_settings_by_the_names_of_submitit(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = yaml.safe_load((CONF / "hydra" / "launcher" / "with_slurm.yaml").read_text())
    assert locate(settings.pop("_target_")) is SlurmLauncher
    given = {
        **settings,
        **{"folder": str(tmp_path), "gpus_per_node": 2, "mem_gb": 8, "slurm_partition": "gpu", "slurm_account": "us"},
        **{"slurm_qos": "high", "slurm_constraint": "a100", "slurm_gres": "gpu:2", "slurm_setup": ["module load cuda"]},
        "slurm_additional_parameters": {"mail-user": "me"},
    }
    assert None not in given.values()
    found = SlurmLauncher(**given).executor().parameters
    assert (found["time"], found["cpus_per_task"], found["mem"]) == (1440, 4, "8GB")
    expected = {"partition": "gpu", "qos": "high", "setup": ["module load cuda"], "array_parallelism": 256}
    assert expected.items() <= found.items()
    assert "partition" not in SlurmLauncher(**settings | {"folder": str(tmp_path)}).executor().parameters
