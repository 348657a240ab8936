"""Wrong inputs: each is refused in one line that names the override or the file, before anything is written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import SHORT, call, messages
from omegaconf import OmegaConf
from PIL import Image

from mlframework.cli import evaluate, generate, train
from mlframework.runs.run_folder import PARTS, RunFolder

#: What is typed, and what is answered.
TRAIN = [
    # options and keys
    (["task=sinusod"], "task=sinusod: no such option (did you mean sinusoid?); there are "),
    (["algorithm/update=sg"], "algorithm/update=sg: no such option (did you mean sgd?); there are adam, "),
    (["display=[ftis]"], "display=ftis: no such option (did you mean fits?); there are "),
    (["regulariser=[random_kei]"], "regulariser=random_kei: no such option (did you mean random_key?); there are "),
    (["experiment=nope"], "experiment=nope: no such option; there are "),
    (["hydra/launcher=slrm"], "hydra/launcher=slrm: no such option"),
    *(([f"{group}=null"], f"{group}=null: must be an option of the group {group}; --help") for group in PARTS),
    (["evaluation=null"], "evaluation=null: must be an option of the group evaluation; --help lists them"),
    (["task=5"], "task=5: must be an option of the group task; --help lists them"),
    (["algorithm.update=null"], "algorithm.update=null: must be an option of its group"),
    (["task="], "task=: no such option; there are "),
    (["task.k_sho=3"], "task.k_sho=3: there is no task.k_sho (did you mean k_shot?); there are k_shot, k_query"),
    (["trainr.steps=5"], "trainr.steps=5: there is no trainr (did you mean trainer?); there are seed, device, "),
    (["algoritm=anil"], "algoritm=anil: there is no algoritm (did you mean algorithm?)"),
    (["algorithm/updat=sgd"], "algorithm/updat=sgd: there is no group algorithm/updat; --help lists the groups"),
    (["evaluation=none", "evaluation.tasks=10"], "evaluation.tasks=10: there is no evaluation.tasks"),
    (["+task.foo=1"], "task.foo=1: Sinusoid has no such setting; it takes k_shot, k_query"),
    (["+trainer.step=1"], "trainer.step=1: Trainer has no such setting (did you mean steps?); it takes steps, "),
    (["+foo=1"], "foo=1: nothing reads foo; there are seed, threads, "),
    (["+trainr.steps=5"], "trainr.steps=5: nothing reads trainr (did you mean trainer?); there are seed, "),
    (["+seed=1"], "+seed=...: is there already: without the + it is set"),
    (["~trainr"], "Could not delete from config. 'trainr' does not exist."),
    (["~task"], "task=null: must be an option of the group task; --help lists them"),
    (["~trainer.monitor"], "trainer.monitor: must be given, for Trainer"),
    (["algorithm.update=sgd"], "algorithm.update=sgd: must be an option of its group, chosen with a slash"),
    # grammar
    (["a b"], "a b: cannot be read as key=value"),
    (["task.k_shot=[1"], "task.k_shot=[1: cannot be read as key=value; quotes keep special characters"),
    (["seed=1,2"], "seed=1,2: several values make a sweep, with -m; a list is written [a,b]"),
    (["--stepz"], "unrecognized arguments: --stepz: --hydra-help lists the flags"),
    (["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder, looked for at /"),
    (["--config-dir", "file"], "--config-dir file: is a file: must name a folder"),
    (["runs/mine"], "runs/mine: cannot be read as key=value: type run_dir=runs/mine\n"),
    (["run"], "run: cannot be read as key=value: type run_dir=run resume=true\n"),
    (["file"], "file: cannot be read as key=value: type init=file\n"),
    (["resume"], "resume: cannot be read as key=value\n"),
    (["trainer.steps=${nope}"], "trainer.steps: refers to nope, which is not there"),
    (["~suggested.inner_lr"], "algorithm.update.lr: refers to suggested.inner_lr, which is not there"),
    # types
    (["trainer.steps=abc"], "trainer.steps=abc: must be a whole number"),
    (["trainer.meta_batch=1.5"], "trainer.meta_batch=1.5: must be a whole number"),
    (["seed=x"], "seed=x: must be a whole number"),
    (["resume=perhaps"], "resume=perhaps: must be true or false"),
    (["algorithm.update.lr=fast"], "algorithm.update.lr=fast: must be a number"),
    (["base_layer.hidden=40"], "base_layer.hidden=40: must be a list"),
    (["algorithm.checkpoint_steps=2"], "algorithm.checkpoint_steps=2: must be true or false"),
    (["task._target_=nowhere.Task"], "task._target_=nowhere.Task: cannot be imported (No module named 'nowhere')"),
    (["task._target_=mlframework.tasks.Sinus"], "task._target_=mlframework.tasks.Sinus: cannot be imported (No "),
    # values
    (["task.k_shot=0"], "task.k_shot=0: must be "),
    (["algorithm.update.lr=-1"], "algorithm.update.lr=-1: must be above 0"),
    (["algorithm/update=momentum", "algorithm.update.momentum=1"], "algorithm.update.momentum=1: must be at least 0"),
    (["algorithm.inner_steps=0"], "algorithm.inner_steps=0: must be at least 1"),
    (["suggested.inner_steps=0"], "algorithm.inner_steps=0: must be at least 1"),
    (["algorithm.adapts='^nothing'"], "algorithm.adapts=^nothing: matches no parameter; there are features.1.weight, "),
    (["algorithm.frozen='('"], "algorithm.frozen=(: is not a regular expression: "),
    (["algorithm.batch_norm=running"], "algorithm.batch_norm=running: must be "),
    (["algorithm=reptile", "algorithm.meta_gradient.batch_size=0"], "algorithm.meta_gradient.batch_size=0: must be "),
    (["base_layer.norm=layer"], "base_layer.norm=layer: must be one of batch, group, none"),
    (["outer.engine=fast"], "outer.engine=fast: must be one of auto, vectorised, loop"),
    (["outer.chunk=0"], "outer.chunk=0: must be at least 1, or null"),
    (["outer.clip=-1"], "outer.clip=-1: must be above 0, or null"),
    (["optimizer.lr=-1"], "optimizer: cannot be built: ValueError: Invalid learning rate: -1"),
    (["trainer.steps=-1"], "trainer.steps=-1: must be at least 1"),
    (["trainer.monitor_step=-1"], "trainer.monitor_step=-1: must be at least 0, or null"),
    (["trainer.monitor_step=6"], "trainer.monitor_step=6: must be at most 5, the inner steps of validation"),
    (["algorithm=ridge", "trainer.monitor_step=1"], "trainer.monitor_step=1: must be null: nothing is stepped"),
    (["trainer.monitor=query_los"], "trainer.monitor=query_los: must be one of query_loss (did you mean query_loss?)"),
    (["evaluation.tasks=0"], "evaluation.tasks=0: must be at least 1"),
    (["evaluation.split=tset"], "evaluation.split=tset: must be "),
    (["optimizer.lr=inf"], "optimizer.lr=inf: must be a finite number in 32 bits"),
    (["optimizer.lr=1e300"], "optimizer.lr=1e+300: must be a finite number in 32 bits"),
    (["schedule.eta_min=nan"], "schedule.eta_min=nan: must be a finite number in 32 bits"),
    (["schedule.eta_min=-1"], "schedule.eta_min=-1: must be at least 0"),
    (["schedule=linear", "schedule.total_iters=-1"], "schedule.total_iters=-1: must be at least 1"),
    (["base_layer.hidden=[8,nan]"], "base_layer.hidden=nan: must be a finite number in 32 bits"),
    (["trainer.meta_batch=1e15"], "trainer.meta_batch=1000000000000000.0: must be a whole number"),
    (["trainer.meta_batch=1000000000000000"], "trainer.meta_batch=1000000000000000: must be at most 1000000"),
    (["algorithm.inner_steps=1000000000"], "algorithm.inner_steps=1000000000: must be at most 1000000"),
    (["trainer.steps=10000000000"], "trainer.steps=10000000000: must be at most 1000000000"),
    (
        ["trainer.meta_batch=1000000", "task.k_shot=100000"],
        "trainer.meta_batch=1000000: such episodes take 3600",
    ),
    (["task.k_shot=1000000", "trainer.meta_batch=1000000"], "trainer.meta_batch=1000000: such episodes take 36000"),
    (["task=glyphs", "task.n_way=1000", "task.k_query=100000"], "task.k_query=100000: such episodes take "),
    (["threads=100000"], "threads=100000: must be from 1 to "),
    (["threads=0"], "threads=0: must be from 1 to "),
    (["seed=-1"], "seed=-1: must be at least 0"),
    (["allocator=fast"], "allocator=fast: must be tuned or system"),
    (["device=cudaa"], "device=cudaa: must be one of auto, cpu"),
    # what does not go together
    (
        ["algorithm=relation"],
        "algorithm=relation takes classification tasks, and task=sinusoid is a regression: use task=glyphs, or ",
    ),
    (["task=digits", "algorithm=prototypes", "algorithm.distance=near"], "algorithm.distance=near: must be "),
    (["base_layer=conv4"], "base_layer=conv4 reads images, this task's inputs are (1,): use base_layer=mlp"),
    (["task=digits", "base_layer=conv4", "base_layer.downsample=pool"], "base_layer.downsample=pool: images of 8x8 "),
    (["task=digits", "task.n_way=9"], "task.n_way=9: the train split has only the digits 0, 1, 2, 3, 4, 5"),
    (["algorithm=reptile", "algorithm/update=learned_rates"], "no gradient reaches update"),
    # data
    (["task=omniglot", "task.data_dir=empty", "task.download=false"], "task.download=false: empty/omniglot/images_ba"),
    (["task=omniglot", "task.data_dir=incomplete"], "incomplete/images_background.zip: holds 1 characters of 1 alphab"),
    (["task=omniglot", "task.data_dir=truncated"], "truncated/images_background.zip: damaged ("),
    (["task=omniglot", "task.data_dir=other"], "other/images_background.zip: damaged (File is not a zip file): "),
    (["task=image_folder"], "task.path=null: must name a folder that holds one folder of images per class"),
    (["task=image_folder", "task.path=images"], "task.n_way=5: images has only "),
    (["task=image_folder", "task.path=images", "task.n_way=2", "task.k_shot=2"], "task.k_shot=2: images/"),
    # run folders
    (["run_dir=run"], "run_dir=run: holds a run already: resume=true continues it, or name another folder"),
    (["run_dir=in_use"], "run_dir=in_use: another process is using this run folder"),
    (["run_dir=file"], "run_dir=file: file is a file: name a folder"),
    (["run_dir=file/of/it"], "run_dir=file/of/it: file is a file: name a folder"),
    (["run_dir="], "run_dir=: must name a folder"),
    (["run_dir='  '"], "run_dir= : must name a folder"),
    (["run_dir=/"], "run_dir=/: must name a folder of the run's own, as in runs/mine"),
    (["run_dir=${oc.env:HOME}"], f"run_dir={Path.home()}: must name a folder of the run's own"),
    (["run_dir=project"], "run_dir=project: holds environment.json, which no run has written: name another folder"),
    (["run_dir=new", "resume=true"], "resume=true: there is no run in run_dir=new"),
    (["run_dir=run", "resume=true", "algorithm=anil"], "algorithm=anil: this run was started with maml; resume=true "),
    (["run_dir=run", "resume=true", "task.k_shot=3"], "task.k_shot=3: this run was started with 10; resume=true "),
    (["run_dir=broken", "resume=true"], "broken/checkpoints/last.pt: cannot be read as a checkpoint"),
    (["run_dir=no_overrides", "resume=true"], "no_overrides/overrides.yaml: damaged ("),
    (["run_dir=half_config", "resume=true"], "half_config/config.yaml: damaged ("),
    (["run_dir=wider", "resume=true"], "wider/checkpoints/last.pt: a checkpoint of another architecture: base_layer."),
]
EVALUATE = [
    (["run"], "run: cannot be read as key=value: type run=run\n"),
    (["runs/none"], "runs/none: cannot be read as key=value: type run=runs/none\n"),
    (["run", "task.k_shot=3"], "run: cannot be read as key=value: type run=run\n"),
    ([], "run: must be given, as in run=..."),
    (["run="], "run=: must name a folder"),
    (["run=empty"], "empty: not a run folder (it holds no config.yaml)"),
    (["run=run", "weights=worst"], "weights=worst: must be best or last"),
    (["run=run", "evaluation.inner_steps=-1"], "evaluation.inner_steps=-1: must be "),
    (
        ["run=run", "trainer.steps=3"],
        "trainer.steps=3: there is no trainer; there are run, weights, device, ",
    ),
    (["run=no_choices"], "no_choices/choices.json: damaged ("),
    (["run=list_of_choices"], "list_of_choices/choices.json: damaged (it holds no dict)"),
    (["run=half_config"], "half_config/config.yaml: damaged ("),
    (["run=other_config"], "other_config/config.yaml: damaged (it holds no task)"),
    (["run=wider"], "wider/checkpoints/best.safetensors: a checkpoint of another architecture: base_layer.features."),
    (["run=broken"], "broken/checkpoints/best.safetensors: cannot be read as safetensors ("),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a run, broken copies of it, and data that is not what it should be."""
    folder = tmp_path_factory.mktemp("world")
    assert call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=folder).exit_code == 0
    shutil.copytree(folder / "run", folder / "broken")
    for path in (folder / "broken" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, file, text in (
        ("no_choices", "choices.json", '{"task": '),
        ("list_of_choices", "choices.json", "[]"),
        ("no_overrides", "overrides.yaml", "- 'a"),
        ("half_config", "config.yaml", "task: {k_shot: 5"),
        ("other_config", "config.yaml", "name: somebody's"),
    ):
        shutil.copytree(folder / "run", folder / name)
        (folder / name / file).write_text(text)
    shutil.copytree(folder / "run", folder / "wider")
    config = OmegaConf.load(folder / "wider" / "config.yaml")
    config.base_layer.hidden = [50, 50]
    OmegaConf.save(config, folder / "wider" / "config.yaml")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "texts").write_text("Ada\nGrace\n")
    (folder / "project").mkdir()
    (folder / "project" / "environment.json").write_text("{}")
    few_images(folder / "images")
    zips(folder)
    with RunFolder(folder / "in_use").locked():
        yield folder


OF_PATHS = [
    ("task=image_folder", "task.path", "folder"),
    ("task=text_folder", "task.path", "folder or file"),
    ("task=table task.target=a task.task_column=b", "task.path", "file"),
    ("task=ratings task/source=movielens", "task.source.path", "folder"),
    ("task=ratings task/source=table", "task.source.path", "file"),
    ("task=ratings task/source=recbole", "task.source.path", "folder"),
]


@pytest.mark.parametrize(("typed", "key", "kind"), OF_PATHS)
def test_data_that_are_not_there_are_named_with_the_place_where_they_were_looked_for(tmp_path, typed, key, kind):
    said = call(train.main, *SHORT, "run_dir=run", *typed.split(), f"{key}=no.csv", folder=tmp_path)
    assert said.err.startswith(f"{key}=no.csv: there is no such {kind}, looked for at {tmp_path / 'no.csv'}: must name")
    assert (said.exit_code, said.err.count("\n")) == (2, 1)


def test_a_run_that_goes_on_without_its_data_names_their_setting(tmp_path):
    rows = "".join(f"{n % 12},{n * 37 % 101},{n % 7}\n" for n in range(240))
    (tmp_path / "data.csv").write_text(f"name,x,y\n{rows}")
    task = ("task=table", "task.path=data.csv", "task.task_column=name", "task.target=y", "task.k_shot=2")
    small = ("task.k_query=2", "evaluation=none", "display=[]", "trainer.monitor=query_loss", "base_layer.hidden=[4]")
    assert call(train.main, *SHORT, "run_dir=run", *task, *small, folder=tmp_path).exit_code == 0
    (tmp_path / "data.csv").unlink()
    line = f"task.path=data.csv: there is no such file, looked for at {tmp_path / 'data.csv'}: must name a table"
    assert call(train.main, "run_dir=run", "resume=true", folder=tmp_path).err.startswith(line)
    assert call(evaluate.main, "run=run", folder=tmp_path).err.startswith(line)


def few_images(folder: Path) -> None:
    """Ten classes of two images each: too few to draw two shots and a query."""
    for name in range(10):
        (folder / f"class{name}").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4)).save(folder / f"class{name}" / f"{number}.png")


def zips(folder: Path) -> None:
    """Omniglot's two zips: with one character in them, cut in the middle, and something else altogether."""
    for place in ("incomplete", "truncated", "other"):
        (folder / place).mkdir()
        for name in ("images_background", "images_evaluation"):
            path = folder / place / f"{name}.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for drawing in range(20):
                    archive.writestr(f"{name}/Greek/character01/{drawing:02}.png", os.urandom(100))
            if place == "truncated":
                path.write_bytes(path.read_bytes()[:1000])
            if place == "other":
                path.write_text("404: not found")


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize(("typed", "line"), TRAIN, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_training_refuses_in_one_line_before_anything_is_written(world, typed, line):
    run_dir = [] if any(each.startswith("run_dir") for each in typed) else ["run_dir=new"]
    before = files(world)
    said = call(train.main, *SHORT, *run_dir, *typed, folder=world)
    assert said.err.startswith(line), said.err
    assert (said.exit_code, said.err.count("\n"), said.out) == (2, 1, "")
    assert files(world) == before


@pytest.mark.parametrize(("typed", "line"), EVALUATE, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_evaluation_refuses_in_one_line_before_anything_is_written(world, typed, line):
    before = files(world)
    said = call(evaluate.main, *typed, folder=world)
    assert said.err.startswith(line), said.err
    assert (said.exit_code, said.err.count("\n"), said.out) == (2, 1, "")
    assert files(world) == before


GENERATE = [
    (["run"], "run: cannot be read as key=value: type run=run\n"),
    (["texts"], "texts: cannot be read as key=value: type support=texts\n"),
    (["run=run", "+foo.bar=1"], "foo.bar=1: nothing reads foo; there are run, support, unit, "),
    (["run="], "run=: must name a folder"),
    (["run=half_config"], "half_config/config.yaml: damaged ("),
]


@pytest.mark.parametrize(("typed", "line"), GENERATE, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_generation_refuses_in_one_line_before_anything_is_written(world, typed, line):
    before = files(world)
    said = call(generate.main, "support=texts", *typed, folder=world)
    assert said.err.startswith(line), said.err
    assert (said.exit_code, said.err.count("\n"), said.out) == (2, 1, "")
    assert files(world) == before


def test_the_table_is_long_enough():
    assert len(TRAIN) + len(EVALUATE) >= 40


@pytest.mark.parametrize("typed", ["task.k_shot=0", "task=sinusod"])
def test_a_console_script_refuses_with_exit_code_2(tmp_path, typed):
    done = console_script(tmp_path, typed)
    assert (done.returncode, done.stdout, messages(done.stderr).count("\n")) == (2, "", 1)
    assert messages(done.stderr).startswith(typed)
    assert not list(tmp_path.iterdir())


def test_a_traceback_comes_where_it_is_asked_for(tmp_path):
    done = console_script(tmp_path, "task.k_shot=0", HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("task.k_shot=0: ")


def test_an_option_that_is_not_there_may_be_the_users_own(tmp_path):
    (tmp_path / "conf").mkdir()
    ending = "; options of your own need --config-dir\n"
    assert call(train.main, "task=saw", folder=tmp_path).err.endswith(ending)
    said = call(train.main, "--config-dir", "conf", "task=saw", folder=tmp_path)
    assert said.err.startswith("task=saw: no such option") and not said.err.endswith(ending)


def test_a_failure_at_run_time_is_one_line_with_exit_code_1(tmp_path):
    said = call(train.main, *SHORT, "run_dir=run", "algorithm.update.lr=1e30", folder=tmp_path)
    assert said.exit_code == 1
    assert "Traceback" not in said.err
    assert said.err.splitlines()[-1].startswith("step 1: the meta-loss is not finite (task ")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_file_that_cannot_be_written_is_one_line_with_exit_code_75(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        said = call(train.main, *SHORT, "run_dir=run", folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (said.exit_code, said.err.count("\n")) == (75, 1)
    assert said.err.startswith("run/environment.json: cannot be written (File too large)")
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == [".lock"]


def console_script(folder: Path, *typed: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("mlframework-train")
    return subprocess.run(
        [script, *typed], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
