"""Faults of the machine: one line that names the file, the right exit code, and a last good checkpoint to go on from.

docs/faults.md lists them, with these tests.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import Said, call, messages
from faults import AT, RUN, doing, nothing, read_only_folder, read_only_later, small_disk, start
from PIL import Image
from test_resume import curves
from torch import nn

from mlframework.base_layers.checksums import has_checksum, matches
from mlframework.cli import compare, evaluate, train
from mlframework.errors import UserError
from mlframework.files import cache_folder, home_folder, passing_folder
from mlframework.runs import run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import ImageFolder
from mlframework.training import last_checkpoints
from mlframework.training.checkpoint import load_weights, read_metadata, save_weights
from mlframework.training.interrupt import DeferredInterrupt, Stopped, heeding_signals
from mlframework.training.last_checkpoints import kept, newest, write_checkpoint

#: One fault of each kind is among the fast tests; the others take seconds.
slow = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"


def train_in(folder: Path, *more: str) -> Said:
    return call(train.main, *RUN, *more, folder=folder)


def state_in(folder: Path) -> dict:
    return newest(RunFolder(folder / "run").last).state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_in(folder).exit_code == 0
    return folder


def assert_ends_like(whole: Path, folder: Path, *more: str) -> Said:
    """A run goes on, and ends bit for bit as the whole one."""
    said = train_in(folder, "resume=true", *more)
    assert said.exit_code == 0, said.err
    expected, found = state_in(whole), state_in(folder)
    assert found["progress"]["step"] == expected["progress"]["step"] == 6
    for part in ("meta_layer", "optimizer", "generators"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert curves(folder / "run") == curves(whole / "run")
    return said


def refused(said: Said, exit_code: int, line: str) -> None:
    """A command ended with one line, and nothing else but what it had logged before."""
    last = said.err.splitlines()[-1]
    assert (said.exit_code, last[: len(line)]) == (exit_code, line), said.err
    assert "Traceback" not in said.err and "Exception" not in said.err.replace(last, "")


# Checkpoints


def test_any_flipped_bit_and_any_cut_of_a_checkpoint_is_noticed(tmp_path):
    """One bit of each byte; each is another."""
    last, chance = tmp_path / "last.pt", random.Random(0)
    write_checkpoint(last, state(w=torch.randn(3, 4)), keep=1)
    content = last.read_bytes()
    assert torch.equal(newest(last).state["meta_layer"]["w"], torch.load(last, weights_only=True)["meta_layer"]["w"])
    damaged = [flipped(content, place, chance.randrange(8)) for place in range(len(content))]
    for each in (*damaged, *(content[:length] for length in range(0, len(content), 9)), content + b"\0"):
        last.write_bytes(each)
        with pytest.raises(UserError, match=r"last.pt: cannot be read as a checkpoint"):
            newest(last)


def state(step: int = 0, **tensors: torch.Tensor) -> dict:
    """What a checkpoint holds, but for the numbers."""
    return {"meta_layer": tensors, "optimizer": {}, "scheduler": {}, "generators": {}, "progress": {"step": step}}


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_any_flipped_bit_and_any_cut_of_weights_is_noticed(tmp_path):
    file = tmp_path / "w.safetensors"
    save_weights(file, nn.Linear(2, 3), metadata={"note": "x"})
    content = file.read_bytes()
    assert read_metadata(file)["note"] == "x"
    for damaged in (flipped(content, place, bit) for place in range(len(content)) for bit in range(8)):
        assert not matches(damaged) or not readable(damaged)
    for damaged in (content[:-1], content[:100], content[:4], b"", content + b"\0"):
        file.write_bytes(damaged)
        why = r"(the file is cut off, damaged, or of another format|its checksum does not match: the file is damaged)"
        with pytest.raises(UserError, match=rf"w.safetensors: cannot be read as safetensors \({why}\)"):
            load_weights(file, nn.Linear(2, 3))


def readable(content: bytes) -> bool:
    try:
        safetensors.torch.load(content)
    except safetensors.SafetensorError:
        return False
    return True


@pytest.mark.parametrize("damage", ["flipped", *(pytest.param(each, marks=slow) for each in ("cut", "empty", "gone"))])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(whole, tmp_path, damage):
    shutil.copytree(whole / "run", tmp_path / "run")
    last = RunFolder(tmp_path / "run").last
    content = last.read_bytes()
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes({"flipped": flipped(content, 999, 3), "cut": content[:-99], "empty": b""}[damage])
    said = assert_ends_like(whole, tmp_path)
    (line,) = (line for line in said.err.splitlines() if "takes its place" in line)
    assert re.search(r"run/checkpoints/last.pt: (cannot be read as a checkpoint \(.+\)|is not there): step 4 of ", line)
    assert damage == "gone" or last.with_name("last.pt.damaged").exists()
    assert newest(last).path == last and not newest(last).damaged
    assert "run folder run, goes on at step 4: " in said.err


def test_checkpoints_of_which_none_is_whole_are_all_named_in_words(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    last = RunFolder(tmp_path / "run").last
    content = last.read_bytes()
    last.write_bytes(flipped(content, 999, 3))
    last.with_name("last.1.pt").write_bytes(content[:-99])
    why = "; nor can last.1.pt be read: use another copy of the run folder, or start a new run"
    line = "run/checkpoints/last.pt: cannot be read as a checkpoint"
    refused(train_in(tmp_path, "resume=true"), 2, f"{line} (its checksum does not match: the file is damaged){why}")
    last.write_bytes(content[:-99])
    refused(train_in(tmp_path, "resume=true"), 2, f"{line} (the file is cut off, damaged, or of another format){why}")


def test_checkpoints_that_are_gone_are_missed(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    said = train_in(tmp_path, "resume=true")
    line = (
        "run/checkpoints: no checkpoint is there any more, and the run had one of step 6: put it back, or start a new"
    )
    refused(said, 2, line)
    assert len(said.err.splitlines()) == 1
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_and_says_so(whole, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(last_checkpoints, "write_checkpoint", killed)
    with pytest.raises(Killed):
        train_in(tmp_path)
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").holds_run
    said = assert_ends_like(whole, tmp_path)
    assert "run folder run, no step is in a checkpoint: starts at step 0: " in said.err


@slow
def test_the_last_checkpoints_are_kept_and_the_oldest_go(tmp_path):
    assert train_in(tmp_path, "trainer.keep_checkpoints=3", "trainer.checkpoint_every=1").exit_code == 0
    last = RunFolder(tmp_path / "run").last
    steps = {path.name: newest(path).state["progress"]["step"] for path in kept(last)}
    assert steps == {"last.pt": 6, "last.1.pt": 5, "last.2.pt": 4}
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.safetensors", *sorted(steps)]
    go_on = ("trainer.keep_checkpoints=1", "trainer.steps=7", "schedule.T_max=6", "resume=true")
    assert train_in(tmp_path, *go_on).exit_code == 0
    assert kept(last) == [last]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", range(4))
def test_a_whole_checkpoint_is_there_between_any_two_changes_of_names(tmp_path, monkeypatch, at):
    last, count = tmp_path / "last.pt", 0
    for step in range(4):
        write_checkpoint(last, state(step), keep=3)

    def killing(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > at:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("replace", "link"):
        monkeypatch.setattr(last_checkpoints.os, name, killing(getattr(os, name)))
    with pytest.raises(Killed):
        write_checkpoint(last, state(4), keep=3)
    monkeypatch.undo()
    found = newest(last)
    assert found.state["progress"]["step"] == 3 and not found.damaged
    assert len(kept(last)) > 1


@slow
def test_checkpoints_without_a_checksum_still_load(whole, tmp_path):
    """As older versions wrote them."""
    shutil.copytree(whole / "run", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    kept(folder.last)[1].replace(folder.last)
    torch.save(newest(folder.last).state, folder.last)
    assert not has_checksum(folder.last)
    folder.best.write_bytes(safetensors.torch.save(safetensors.torch.load_file(folder.best)))
    assert_ends_like(whole, tmp_path)
    torch.save(newest(folder.last).state, folder.last)
    record = folder.last.read_bytes()
    place = record.index(newest(folder.last).state["meta_layer"]["base_layer.features.1.weight"].numpy().tobytes())
    folder.last.write_bytes(flipped(record, place, 0))
    assert "its checksum does not match" in str(newest(folder.last).damaged[folder.last])


def test_damaged_best_weights_are_refused_and_a_run_that_goes_on_finds_others(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    best = RunFolder(tmp_path / "run").best
    best.write_bytes(flipped(best.read_bytes(), best.stat().st_size - 20, 5))
    said = call(evaluate.main, "run=run", "evaluation.tasks=2", folder=tmp_path)
    refused(said, 2, "run/checkpoints/best.safetensors: cannot be read as safetensors (its checksum does not match")
    said = train_in(tmp_path, "resume=true")
    assert said.exit_code == 0 and "best.safetensors: cannot be read" in said.err
    assert RunFolder(tmp_path / "run").read_result()["best"]["step"] == 6


# Signals


OTHERS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(each, marks=slow) for each in OTHERS)])
def test_a_signal_is_obeyed_after_the_step_with_a_checkpoint_and_the_exit_code_of_shells(whole, tmp_path, name):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    said = train_in(tmp_path, *doing(f"send:{number:d}"))
    assert said.exit_code == 128 + number
    assert said.err.splitlines()[-2:] == ["mlframework-train run_dir=run resume=true goes on", f"stopped by {name}"]
    assert state_in(tmp_path)["progress"]["step"] == AT, "no checkpoint is due before the sixth"
    assert signal.getsignal(number) is signal.SIG_DFL
    assert not RunFolder(tmp_path / "run").result.exists()
    assert_ends_like(whole, tmp_path)


@slow
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train_in(tmp_path, *doing(f"send:{signal.SIGHUP:d}")).exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_signal_outside_the_training_ends_the_command(tmp_path):
    with pytest.raises(Stopped, match="stopped by SIGTERM"), heeding_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("context", [heeding_signals, DeferredInterrupt])
def test_a_process_that_was_forked_dies_by_the_signal(context):
    with context():
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM


# Disks


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(whole, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        said = train_in(disk, *doing(f"fill:{disk}"))
        refused(said, 75, "run/")
        assert "cannot be written (No space left on device); then mlframework-train run_dir=run " in said.err
        assert state_in(disk)["progress"]["step"] == 4
        (disk / "filler").unlink()
        assert_ends_like(whole, disk)


@slow
def test_a_limit_on_the_size_of_files_is_one_line_and_keeps_the_checkpoint(whole, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        said = train_in(tmp_path, *doing("limit_files:3000"), "logger.figures=false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(said, 75, "run/")
    assert "cannot be written (File too large); then " in said.err
    assert state_in(tmp_path)["progress"]["step"] == 4
    assert not list((tmp_path / "run").rglob("*.part"))
    assert_ends_like(whole, tmp_path)


def test_a_run_folder_that_cannot_be_written_to_is_refused_before_the_work(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "run", tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    before = sorted(tmp_path.rglob("*"))
    line = "=run: cannot be written to (Permission denied): copy the folder to one of your own, and name the copy"
    monkeypatch.setattr(run, "load_run", None)  # the work does not begin
    with read_only_folder(tmp_path / "run"):
        refused(call(evaluate.main, "run=run", folder=tmp_path), 2, f"run{line}")
        refused(call(compare.main, "run=run", folder=tmp_path), 2, f"run{line}")
        refused(train_in(tmp_path, "resume=true"), 2, f"run_dir{line}")
    assert sorted(tmp_path.rglob("*")) == before


@slow
def test_a_disk_that_becomes_read_only_is_one_line_and_a_read_only_one_is_refused_at_once(whole, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        run = f"run_dir={disk / 'run'}"  # a path from the root sees the change, the working directory does not
        with read_only_later(disk):
            said = train_in(disk, run, *doing(f"make_read_only:{disk}"))
            refused(said, 75, f"{disk}/run/")
            assert "cannot be written (Read-only file system); then " in said.err
            refused(train_in(disk, run, "resume=true"), 2, f"{run}: cannot be written to (Read-only file system)")
        assert_ends_like(whole, disk)


@pytest.mark.parametrize(
    ("do", "why"),
    [
        ("remove", "the folder is gone: it was removed"),
        pytest.param("replace", "another folder has taken its place", marks=slow),
    ],
)
def test_a_run_folder_that_vanishes_is_one_line_and_is_not_made_again(tmp_path, do, why):
    said = train_in(tmp_path, *doing(f"{do}:run"))
    refused(said, 75, f"run: cannot be read or written ({why}")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ([".lock"] if do == "replace" else [])


class Vanishing(ImageFolder):
    """Images whose folder is removed at a step."""

    draws = 0

    def sample(self, num_tasks, split, generator):
        if split == "train" and num_tasks == 4:
            self.draws += 1
            if self.draws == AT:
                shutil.rmtree(self.path)
        return super().sample(num_tasks, split, generator)


def images(folder: Path) -> tuple[str, ...]:
    """Thirty classes of three images in a folder, and the overrides of a task with them; their arrays are cached."""
    for number in range(90):
        place = folder / "images" / f"class{number % 30}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (2 * number, 80 * (number % 3), 0)).save(place / f"{number}.png")
    task = ("task=image_folder", "task.path=images", "task.n_way=2", "task.k_shot=1", "task.k_query=1")
    return (*task, "task.image_size=8", "base_layer=mlp")


@slow
def test_a_data_folder_that_vanishes_is_not_missed_until_the_next_start(tmp_path):
    """Data are read once, at the start."""
    said = train_in(tmp_path, *images(tmp_path), f"task._target_={__name__}.Vanishing")
    assert said.exit_code == 0, said.err
    assert not (tmp_path / "images").exists()
    refused(
        train_in(tmp_path, "resume=true"),
        2,
        f"task.path=images: there is no such folder, looked for at {tmp_path / 'images'}: must name a",
    )


# Memory, streams, homes, terminals: each in a process of its own


def said_in(folder: Path, *more: str, prepare=nothing) -> Said:
    """What a training in a process of its own says, and how it ends."""
    process = start(*RUN, *more, folder=folder, prepare=prepare)
    process.join(300)
    assert process.exitcode is not None
    return Said(process.exitcode, (folder / "out").read_text(), messages((folder / "err").read_text()))


@slow
def test_full_memory_is_one_line_and_keeps_the_checkpoint(whole, tmp_path):
    said = said_in(tmp_path, *doing(f"limit_memory:{1 << 28}"))
    refused(said, 75, "the memory is full: a smaller outer.chunk or trainer.meta_batch needs less; then ")
    assert state_in(tmp_path)["progress"]["step"] == 4
    assert_ends_like(whole, tmp_path)


def close_pipe_of(number: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, number)


def close_pipe_of_out() -> None:
    close_pipe_of(1)


def close_pipes() -> None:
    close_pipe_of(1)
    close_pipe_of(2)


def fill_out() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@slow
@pytest.mark.parametrize(
    ("prepare", "exit_code", "line"),
    [
        (close_pipe_of_out, 141, "stdout: not all could be written (Broken pipe)"),
        (fill_out, 75, "stdout: not all could be written (No space left on device)"),
        (close_pipes, 141, ""),
    ],
)
def test_a_run_whose_output_nobody_takes_comes_to_its_end(whole, tmp_path, prepare, exit_code, line):
    said = said_in(tmp_path, *QUICK, prepare=prepare)
    assert (said.exit_code, said.err.splitlines()[-1:]) == (exit_code, [line] if line else [])
    assert "Traceback" not in said.err and said.out == ""
    assert RunFolder(tmp_path / "run").read_result()["evaluation"] is not None


#: An evaluation, which is shown on stdout.
QUICK = ("evaluation=default", "evaluation.tasks=2", "evaluation.validation_tasks=2", "evaluation/baseline=[]")


def close_all() -> None:
    """No terminal, no streams at all."""
    os.setsid()
    for number in (0, 1, 2):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None  # as Python has them then
    os.environ.pop("TERM", None)


@slow
def test_without_a_terminal_and_with_closed_streams_a_run_is_the_same(whole, tmp_path):
    assert said_in(tmp_path, prepare=close_all).exit_code == 0
    expected, found = state_in(whole), state_in(tmp_path)
    torch.testing.assert_close(found["meta_layer"], expected["meta_layer"], rtol=0, atol=0)
    assert curves(tmp_path / "run") == curves(whole / "run")


def no_home() -> None:
    """A home that is not there and cannot be made, as in many containers."""
    del os.environ["MLFRAMEWORK_CACHE"]
    os.environ["HOME"] = "/proc/nowhere"


@slow
def test_a_user_without_a_home_trains(tmp_path):
    said = said_in(tmp_path, *images(tmp_path), prepare=no_home)
    assert said.exit_code == 0, said.err
    assert RunFolder(tmp_path / "run").result.exists()


def test_a_user_whose_home_nobody_knows_has_a_cache(monkeypatch):
    if os.getuid():
        pytest.skip("only root can become another user")
    for name in ("HOME", "MLFRAMEWORK_CACHE"):
        monkeypatch.delenv(name, raising=False)
    child = os.fork()
    if not child:
        os.setuid(54321)
        found = home_folder() is None and cache_folder().is_dir()
        passing_folder().cleanup()
        os._exit(0 if found else 1)
    assert os.waitpid(child, 0)[1] == 0


# Other processes


def hold(folder: Path) -> None:
    """Locks a run folder, says so, and never lets go of it."""
    with RunFolder(folder / "run").locked():
        (folder / "held").touch()
        time.sleep(600)


@slow
def test_a_run_folder_in_use_is_refused_and_one_whose_owner_died_is_not(tmp_path):
    owner = multiprocessing.get_context("forkserver").Process(target=hold, args=(tmp_path,))
    owner.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    refused(train_in(tmp_path), 2, "run_dir=run: another process is using this run folder")
    owner.kill()
    owner.join()
    assert train_in(tmp_path).exit_code == 0


def cache_here() -> None:
    os.environ["MLFRAMEWORK_CACHE"] = "cache"


@slow
def test_six_runs_at_once_on_an_empty_cache_end_alike(tmp_path):
    task, runs = images(tmp_path), [f"run_dir=run{number}" for number in range(6)]
    processes = [start(*RUN, *task, run, folder=tmp_path, prepare=cache_here) for run in runs]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 6, (tmp_path / "err").read_text()
    states = [newest(RunFolder(tmp_path / run.partition("=")[2]).last).state["meta_layer"] for run in runs]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert any(name.endswith(".npz") for name in left) and not any(name.endswith(".part") for name in left)


@pytest.mark.parametrize(
    "content",
    [None, pytest.param(b"", marks=slow), pytest.param(b"PK\x03\x04 no archive", marks=slow)],
    ids=["cut", "empty", "garbage"],
)
def test_a_damaged_cache_is_built_again(tmp_path, monkeypatch, content):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "cache"))
    task = images(tmp_path)
    assert train_in(tmp_path, *task).exit_code == 0
    found = [path for path in cache_folder().rglob("*") if path.is_file()]
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    assert train_in(tmp_path, *task, "run_dir=again").exit_code == 0
    first, again = (newest(RunFolder(tmp_path / name).last).state["meta_layer"] for name in ("run", "again"))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


# The page


def test_each_fault_of_the_page_has_a_test_that_exists():
    page = (DOCS / "faults.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| fault \|.*\n\| --- .*\n((?:\|.*\n)+)", page, re.MULTILINE)
    tests = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in table.splitlines()]
    assert len(tests) >= 20 and all(tests), "a row without a test"
    for file, name in (each for row in tests for each in row):
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), f"{file}::{name}"
