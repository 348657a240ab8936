"""Sweeps: every job as if it ran alone, a table at the end, failures that stay with their job."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SHORT, call, messages
from omegaconf import OmegaConf
from scipy import stats

from mlframework.cli import train
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.sweep import JobRow, direction, grouped, read_rows

#: One thread, as the workers of joblib have: other threads add up in another order.
SMALL = (*SHORT, "threads=1", "evaluation=none", "base_layer=mlp", "base_layer.hidden=[8]")
#: The optuna that hydra-optuna-sweeper 1.3.0 brings uses what SQLAlchemy 2 has moved.
OLD_OPTUNA = pytest.mark.filterwarnings("ignore")
EIGHT = ("algorithm=maml,fomaml,anil,reptile", "task=sinusoid,glyphs")


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


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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
        assert (float(row["mean"]), float(row["half_width"])) == (interval["mean"], interval["half_width"])
        assert (row["status"], row["trainer.steps"]) == ("finished", "2")
        assert float(row["seconds"]) > 0
        assert re.search(rf"{row['job']} │ {row['algorithm']} +│ {row['task']}", said.out)


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
    folder = eight[0] / "2"
    said = call(train.main, f"run_dir={folder}", "resume=true", "trainer.steps=4", "schedule.T_max=2", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert json.loads((folder / "result.json").read_text())["step"] == 4
    assert RunFolder(folder).config().run_dir == str(folder)


def test_an_interrupted_sweep_goes_on(tmp_path):
    folder = tmp_path / "sweep"
    typed = ("task=sinusoid", "trainer.meta_batch=2,3,4")
    whole = sweep(folder, *typed)
    assert whole.exit_code == 0, whole.err
    before = table(folder)
    finished, cut_off, never_started = (folder / str(number) for number in range(3))
    written = (finished / "result.json").stat().st_mtime_ns
    (cut_off / "result.json").unlink()
    shutil.rmtree(never_started)

    said = sweep(folder, *typed, "resume=true")
    assert said.exit_code == 0, said.err
    assert f"{finished}: finished before" in said.out and f"{cut_off}: finished before" not in said.out
    assert (finished / "result.json").stat().st_mtime_ns == written
    # What was cut off had been trained: only what never started trains.
    assert said.err.count("validation query_loss") * 3 == whole.err.count("validation query_loss") > 0
    assert [row | {"seconds": ""} for row in table(folder)] == [row | {"seconds": ""} for row in before]


def test_a_sweep_that_is_resumed_as_another_says_so(tmp_path):
    folder = tmp_path / "sweep"
    assert sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2").exit_code == 0
    said = sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.3", "resume=true")
    assert said.exit_code == 1
    assert "optimizer.lr=0.3: this run was started with 0.2; resume=true cannot change it" in said.err


def kept(folder: Path) -> dict[Path, bytes]:
    """What the jobs and the table of a sweep came to."""
    return {path: path.read_bytes() for pattern in ("*/*.json", "*.csv") for path in folder.glob(pattern)}


@pytest.mark.parametrize(
    "typed",
    [
        ("optimizer.lr=0.1,0.2"),
        ("optimizer.lr=0.1,0.3", "resume=true"),
        ("optimizer.lr=0.5,0.6"),
        ("optimizer.lr=0.1,0.2", "task.k_shot=0"),
        ("optimizer.lr=0.1,0.2", "launcher=joblib"),
    ],
    ids=str,
)
def test_a_second_sweep_in_a_folder_leaves_finished_jobs_and_their_table_as_they_are(two, typed):
    folder, before = two
    typed = (typed,) if isinstance(typed, str) else typed
    said = sweep(folder, "task=sinusoid", *typed)
    assert said.exit_code == 1
    assert "Traceback" not in said.err
    assert kept(folder) == before
    assert not list(folder.rglob("refused.*"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished sweep of two jobs, and what it holds."""
    folder = tmp_path_factory.mktemp("two") / "sweep"
    assert sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2").exit_code == 0
    assert [row["status"] for row in table(folder)] == ["finished", "finished"]
    return folder, kept(folder)


@pytest.mark.slow
def test_a_second_sweep_is_refused_while_another_runs_in_the_same_folder(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    hold = f"lock = locked_folder('', __import__('pathlib').Path({str(folder)!r}), '')"
    code = f"import sys; from mlframework.runs.run_folder import locked_folder; {hold}; print('held', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        said = sweep(folder, "seed=0,1")
        other.communicate()
    assert (said.exit_code, said.out) == (2, "")
    assert said.err == f"hydra.sweep.dir={folder}: another sweep is running in this folder\n"
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_job_that_failed_before_runs_again_and_its_failure_is_gone(tmp_path):
    folder = tmp_path / "sweep"
    assert sweep(folder, "optimizer.lr=0.1", "task.k_shot=0").exit_code == 1
    assert (folder / "0" / "failed.json").exists()
    said = sweep(folder, "optimizer.lr=0.1", "resume=true")
    assert said.exit_code == 0, said.err
    assert [row["status"] for row in table(folder)] == ["finished"]


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
    damaged = tmp_path / "sweep" / "1" / name
    damaged.write_text(text)
    rows = read_rows(tmp_path / "sweep")
    assert [(row.status, row.overrides["optimizer.lr"]) for row in rows] == [("finished", "0.1"), ("damaged", "0.2")]
    assert rows[1].error == f"damaged: {damaged}"


def test_a_sweep_with_a_damaged_record_ends_with_its_table(two, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(two[0], folder)
    (folder / "1" / "result.json").write_text("{")
    said = sweep(folder, "task=sinusoid", "optimizer.lr=0.1,0.2", "resume=true")
    assert said.exit_code == 1
    assert "Traceback" not in said.err
    assert [row["status"] for row in table(folder)] == ["finished", "damaged"]
    assert f"\njob 1: damaged: {folder / '1' / 'result.json'}\n" in said.out


@pytest.mark.parametrize("launcher", ["", "launcher=joblib"])
def test_a_job_that_fails_ends_neither_the_others_nor_in_silence(tmp_path, launcher):
    said = sweep(tmp_path / "sweep", "task.k_shot=0,5", "algorithm.update.lr=0.01,1e30", *filter(None, [launcher]))
    assert said.exit_code == 1
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["failed", "failed", "finished", "failed"]
    assert "\njob 0: task.k_shot=0: must be " in said.out
    assert "\njob 3: step 1: the meta-loss is not finite (task " in said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "sweep" / "0" / "config.yaml").exists()


def test_a_job_that_was_killed_is_called_lost(tmp_path):
    RunFolder(tmp_path / "0").path.mkdir()
    (tmp_path / "0" / "config.yaml").touch()
    assert [(row.job, row.status) for row in read_rows(tmp_path)] == [("0", "lost")]


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
    means = [read_rows(tmp_path / "sweep")[job].mean for job in (0, 2, 4)]
    low, high = stats.t.interval(0.95, 2, loc=stats.tmean(means), scale=stats.sem(means))
    assert float(rows[0]["mean"]) == pytest.approx((low + high) / 2)
    assert float(rows[0]["half_width"]) == pytest.approx((high - low) / 2)
    assert "interval over seeds" in said.out
    assert len((tmp_path / "sweep" / "sweep_jobs.csv").read_text().splitlines()) == 7


def test_a_group_of_seeds_says_how_many_finished():
    rows = [
        JobRow("0", "finished", {"seed": "0"}, "query_loss", 1.0, 0.1, 2.0),
        JobRow("1", "failed", {"seed": "1"}, error="no"),
        JobRow("2", "finished", {"seed": "2"}, "query_loss", 3.0, 0.1, 2.0),
    ]
    (row,) = grouped(rows)
    assert (row.job, row.status, row.mean, row.seconds, row.error) == ("0,1,2", "2 of 3 finished", 2.0, 4.0, "no")


def test_a_seed_without_a_finite_value_leaves_no_mean_and_one_seed_no_interval():
    diverged = JobRow("0", "finished", {"seed": "0"}, "query_loss", None, None, 2.0)
    reached = JobRow("1", "finished", {"seed": "1"}, "query_loss", 1.0, 0.1, 2.0)
    failed = JobRow("2", "failed", {"seed": "2"}, error="no")
    assert [row[4:6] for row in grouped([diverged, reached])] == [(None, None)]
    assert [row[4:6] for row in grouped([reached, failed])] == [(1.0, None)]


def test_a_result_of_a_single_validation_task_is_shown_without_an_interval(tmp_path):
    said = sweep(tmp_path / "sweep", "algorithm=maml,anil", "trainer.validation_tasks=1")
    assert said.exit_code == 0, said.err
    assert [row["half_width"] for row in table(tmp_path / "sweep")] == ["", ""]
    assert "nan" not in said.out and "±" not in said.out.replace("mean ±", "")


def test_a_single_seed_keeps_its_interval_over_tasks():
    rows = [JobRow("0", "finished", {"seed": "0"}, "query_loss", 1.0, 0.1, 2.0)]
    assert grouped(rows) == rows


@OLD_OPTUNA
def test_a_search_ends_with_its_best_parameters_and_survives_trials_that_fail(tmp_path):
    trials = "algorithm.update.lr=choice(-1.0,0.01,1e30)"
    said = sweep(tmp_path / "sweep", "sweep=optuna", "hydra.sweeper.n_trials=6", trials)
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    finished = [row for row in table(tmp_path / "sweep") if row["status"] == "finished"]
    assert said.exit_code == 1
    assert 0 < len(finished) < 6
    assert best.best_value == min(float(row["mean"]) for row in finished)
    assert best.best_params["algorithm.update.lr"] == 0.01
    assert "Best parameters: {" in said.out


@OLD_OPTUNA
def test_a_search_in_which_every_trial_fails_still_ends_with_its_table(tmp_path):
    said = sweep(tmp_path / "sweep", "sweep=optuna", "hydra.sweeper.n_trials=2", "task.k_shot=0")
    assert said.exit_code == 1
    assert "Traceback" not in said.err
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["failed", "failed"]


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


def test_a_launcher_that_is_not_installed_names_the_extra(tmp_path):
    hide = "import sys; sys.modules['hydra_plugins.hydra_joblib_launcher'] = None; "
    start = "sys.argv = ['mlframework-train', '-m', 'launcher=joblib', 'seed=0,1']; "
    code = f"{hide}{start}from mlframework.cli.train import main; main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert messages(done.stderr) == "launcher=joblib: needs an extra: pip install 'mlframework[sweep]'\n"
