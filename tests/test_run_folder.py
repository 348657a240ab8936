"""A run folder: only files of the run are removed or replaced, and only by the process that holds it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SHORT, call, messages

from mlframework.cli import train
from mlframework.errors import InvalidValue
from mlframework.files import part_of
from mlframework.runs.git_state import first_git_state, git_state
from mlframework.runs.run_folder import RunFolder

RUN = (*SHORT, "evaluation=none", "run_dir=run")

#: A task whose first draw waits until the other process has come to its end.
WAITING = """
import time
from pathlib import Path
from mlframework.tasks import Sinusoid

class Waiting(Sinusoid):
    def sample(self, num_tasks, split, generator):
        Path("checked").touch()
        while not Path("ended").exists():
            time.sleep(0.01)
        return super().sample(num_tasks, split, generator)
"""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_locking_removes_what_killed_writers_of_this_run_left_and_no_other_file(tmp_path):
    folder = RunFolder(tmp_path)
    inner = RunFolder(tmp_path / "runs" / "inner")
    ours = [part_of(path) for path in (folder.result, tmp_path / "config.yaml", folder.last, folder.best)]
    download = tmp_path / "film.mkv.part"
    named_alike = tmp_path / "result.json.part"
    others = [
        *(download, named_alike, tmp_path / "Downloads" / "film.mkv.part", part_of(tmp_path / "omniglot.npz")),
        *(part_of(inner.result), part_of(inner.last), part_of(tmp_path / "checkpoints" / "mine.pt")),
        part_of(tmp_path / "last.pt"),
    ]
    for path in (*ours, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("written")
    with folder.locked():
        assert not [path for path in ours if path.exists()]
        assert [path for path in others if not path.exists()] == []


def test_locking_keeps_what_a_file_of_the_same_name_as_the_lock_holds(tmp_path):
    (tmp_path / ".lock").write_text("a user's")
    with RunFolder(tmp_path).locked():
        assert (tmp_path / ".lock").read_text() == "a user's"


@pytest.mark.parametrize("path", ["", " ", "\t"])
def test_a_run_folder_has_a_name(path):
    with pytest.raises(InvalidValue, match=r"run_dir=\s*: must name a folder"):
        RunFolder(path)


def test_of_two_processes_that_found_no_run_the_second_cannot_overwrite_the_first(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    script = Path(sys.executable).with_name("mlframework-train")
    typed = [script, *RUN, "task._target_=waiting.Waiting", "seed=1"]
    with subprocess.Popen(typed, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as second:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checked").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        first = call(train.main, *RUN, folder=tmp_path)
        finished = contents(tmp_path / "run")
        (tmp_path / "ended").touch()
        _, err = second.communicate(timeout=60)
    assert first.exit_code == 0, first.err
    assert (second.returncode, messages(err).count("\n")) == (2, 1)
    assert messages(err).startswith("run_dir=run: holds a run already: ")
    assert contents(tmp_path / "run") == finished


def test_runs_record_the_code_that_their_process_found_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = first_git_state()
    assert before == {"commit": None, "changed": False}
    subprocess.run(
        "git init -q && git -c user.email=a -c user.name=a commit -q --allow-empty -m a", shell=True, check=True
    )
    assert git_state()["commit"] is not None
    assert first_git_state() == before


def test_the_latest_evaluation_is_a_file_of_its_own(tmp_path):
    folder = RunFolder(tmp_path / "run")
    first, second = folder.add_evaluation({"loss": 1.0}), folder.add_evaluation({"loss": 2.0})
    latest = tmp_path / "run" / "evaluation.json"
    assert (first.name, second.name, latest.read_text()) == ("1.json", "2.json", second.read_text())
    latest.write_text("changed by hand")
    assert '"loss": 2.0' in second.read_text()
    (second.parent / "2024-mine.json").touch()
    assert folder.add_evaluation({}).name == "3.json"
