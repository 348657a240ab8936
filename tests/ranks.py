"""Starts the ranks of a run as torchrun does, but from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

from mlframework import processes
from mlframework.runs.run import train_run
from mlframework.runs.run_folder import RunFolder

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlframework.runs.run", "hydra", "torch.utils.tensorboard", "torch.distributed"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The processes of so many ranks, each of which calls a function."""
    port = free_port()
    ranks = [CONTEXT.Process(target=as_rank, args=(rank, count, port, function, args)) for rank in range(count)]
    for each in ranks:
        each.start()
    return ranks


def run(count: int, function: Callable[..., Any], *args: Any) -> None:
    """So many ranks, to their end."""
    codes = ended(start(count, function, *args))
    assert codes == [0] * count, f"exit codes of the ranks: {codes}"


def ended(ranks: list[Any], seconds: float = 1800) -> list[int | None]:
    for each in ranks:
        each.join(seconds)
        if each.is_alive():
            each.kill()
            each.join()
    return [each.exitcode for each in ranks]


def as_rank(rank: int, count: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with processes.one_speaks(), processes.joined():
        function(*args)


def train(folder: Path, *overrides: str, float64: bool = False) -> None:
    """One run, as the command would make it."""
    torch.set_default_dtype(torch.float64 if float64 else torch.float32)
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, f"run_dir={folder}"])
    train_run(config, RunFolder(folder), overrides=list(overrides))


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
