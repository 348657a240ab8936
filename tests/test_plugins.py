"""Config folders of installed packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SHORT
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from test_docs import DOCS, FENCE

from mlframework.cli.plugins import InstalledConfigs

ALGORITHM = "_target_: their_package.layers.NearestMean\n"


def block(page: str, name: str) -> str:
    """The block of a page of docs/ that is the file of this name."""
    return next(text for _, file, text in FENCE.findall((DOCS / page).read_text()) if file == name)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process in which a package with a task and an algorithm has been installed by pip."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    package = source / "their_package"
    for folder in ("task", "algorithm"):
        (package / "conf" / folder).mkdir(parents=True)
    (source / "pyproject.toml").write_text(block("add-a-task.md", "their_package/pyproject.toml"))
    (package / "tasks.py").write_text(block("add-a-task.md", "their_package/their_package/tasks.py"))
    (package / "layers.py").write_text(block("add-an-algorithm.md", "my_layers.py"))
    blobs = block("add-a-task.md", "their_package/their_package/conf/task/blobs.yaml")
    (package / "conf" / "task" / "blobs.yaml").write_text(blobs)
    (package / "conf" / "algorithm" / "nearest_mean.yaml").write_text(ALGORITHM)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True)
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def train(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("mlframework-train")
    return subprocess.run([script, *arguments], env=environment, cwd=folder, capture_output=True, text=True)


def test_help_lists_the_options_of_an_installed_package(installed, tmp_path):
    said = train(installed, tmp_path, "--help").stdout
    assert re.search(r"^algorithm.*: .*\bmaml\b", said, re.MULTILINE)
    assert re.search(r"^algorithm.*: .*\bnearest_mean\b", said, re.MULTILINE)
    assert re.search(r"^task: blobs, .*\bdigits\b", said, re.MULTILINE)


@pytest.mark.slow
def test_an_installed_package_s_algorithm_trains_on_its_task(installed, tmp_path):
    short = [override for override in SHORT if not override.startswith("logger")]
    done = train(installed, tmp_path, "task=blobs", "algorithm=nearest_mean", "evaluation=none", "run_dir=run", *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """Makes a distribution with one entry point importable."""

    def make(value: str) -> Path:
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mlframework.conf]\ntheirs = {value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    return make


def test_our_own_options_come_before_those_of_packages(entry_point):
    folder = entry_point("their_configs")
    (folder / "their_configs").mkdir()
    path = ConfigSearchPathImpl()
    path.append("main", "pkg://mlframework.conf")
    InstalledConfigs().manipulate_search_path(path)
    assert [(each.provider, each.path) for each in path.get_path()] == [
        ("main", "pkg://mlframework.conf"),
        ("theirs", f"file://{folder / 'their_configs'}"),
    ]


def test_a_package_that_cannot_be_imported_is_left_out_with_a_warning(entry_point):
    entry_point("absent_package.conf")
    path = ConfigSearchPathImpl()
    with pytest.warns(UserWarning, match="theirs = absent_package.conf cannot be imported"):
        InstalledConfigs().manipulate_search_path(path)
    assert not path.get_path()
