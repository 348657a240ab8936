"""Faults that really happen: a small disk, a task that does something at a step, a command in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from mlframework.cli import train
from mlframework.tasks import Sinusoid

#: A run of six steps with a checkpoint at every second one.
RUN = (
    *("base_layer.hidden=[8]", "trainer.steps=6", "trainer.meta_batch=4", "trainer.validate_every=3"),
    *("trainer.validation_tasks=3", "trainer.checkpoint_every=2", "trainer.log_every=1", "evaluation=none"),
    *("logger.figures=false", "run_dir=run", "threads=1"),
)

#: Root's right to write where the mode of a file or folder forbids it.
CAP_DAC_OVERRIDE = 1

#: The draw of the training at which `Doing` does its deed: the fifth step, after the checkpoint of the fourth.
AT = 5


class Doing(Sinusoid):
    """Sinusoids that call the function `tests.faults.<do>` at a draw of the training."""

    def __init__(self, do: str, k_shot: int = 10, k_query: int = 10) -> None:
        super().__init__(k_shot, k_query)
        self.do, self.draws = do, 0

    def sample(self, num_tasks, split, generator):
        if split == "train" and num_tasks == 4:
            self.draws += 1
            if self.draws == AT:
                DEEDS[self.do.partition(":")[0]](self.do.partition(":")[2])
        return super().sample(num_tasks, split, generator)


#: The faults of a step by their names; a name may have an argument behind a colon.
DEEDS: dict[str, Callable[[str], object]] = {}


def deed(function: Callable[[str], object]) -> Callable[[str], object]:
    DEEDS[function.__name__] = function
    return function


@deed
def send(number: str) -> None:
    """A signal to this process, twice, as a scheduler and a launcher send it."""
    signal.raise_signal(int(number))
    signal.raise_signal(int(number))


@deed
def fill(folder: str) -> None:
    """Leaves no byte on a disk."""
    with open(Path(folder) / "filler", "wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


@deed
def limit_files(size: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


@deed
def remove(folder: str) -> None:
    shutil.rmtree(folder)


@deed
def replace(folder: str) -> None:
    """Another run takes the place."""
    shutil.rmtree(folder)
    (Path(folder) / "checkpoints").mkdir(parents=True)
    (Path(folder) / ".lock").touch()


@deed
def limit_memory(size: str) -> None:
    """Leaves so many more bytes, and takes more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(size), resource.RLIM_INFINITY))
    torch.ones(int(size))  # four bytes each


def doing(do: str) -> tuple[str, str]:
    """The overrides for a task that does something."""
    return f"task._target_={__name__}.Doing", f"+task.do={do}"


@contextmanager
def small_disk(folder: Path, size: str = "400k") -> Iterator[Path]:
    """A file system in memory of this size; the test is skipped where none may be mounted."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@deed
def make_read_only(folder: str) -> None:
    """Nothing can be opened for writing any more; files that are open already are as they were."""
    for how in (["--bind", folder], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *how, folder], check=True)


@contextmanager
def read_only_later(folder: Path) -> Iterator[None]:
    """Within this context `make_read_only` may be done; it is undone at the end."""
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only_folder(folder: Path) -> Iterator[None]:
    """Nobody may write to a folder within this context, root included, who may otherwise do everything."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    now = (ctypes.c_uint32 * 6)(*before)
    now[0] &= ~(1 << CAP_DAC_OVERRIDE)  # of this thread, until it is taken back
    inside = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in inside:
        path.chmod(0o555)
    assert libc.capset(header, now) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
        for path in inside:
            path.chmod(0o755)


def start(*arguments: str, folder: Path, prepare: Callable[[], object]) -> BaseProcess:
    """A training in a process of its own, in which torch is imported already.

    Its output goes to `out` and `err` in the folder, unless `prepare`, which it calls first, leads it elsewhere.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlframework.runs.run", "hydra", "torch.utils.tensorboard.summary"])
    process = context.Process(target=run_command, args=(arguments, folder, prepare))
    process.start()
    return process


def run_command(arguments: tuple[str, ...], folder: Path, prepare: Callable[[], object]) -> None:
    """The work of the process that `start` made."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["mlframework", *arguments]
    prepare()
    train.main()


def nothing() -> None:
    """No preparation."""
