"""A rank that dies ends the run, with its name; under torchrun's restarts the run ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mlframework import processes
from mlframework.cli.train import main

pytestmark = pytest.mark.slow

KILLS = 10
OVERRIDES = (
    "task=sinusoid",
    "algorithm=meta_sgd",
    "base_layer.hidden=[8]",
    "trainer.meta_batch=3",
    "trainer.validation_tasks=4",
    "trainer.validate_every=200",
    "trainer.checkpoint_every=5",
    "evaluation=none",
    "display=[]",
    "threads=1",
    "device=cpu",
)


def command(notes: Path, *arguments: str) -> None:
    """`mlframework-train` as a rank; what it says goes to a file, and its process number to another."""
    rank = os.environ["RANK"]
    said = os.open(notes / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    (notes / f"attempts-{rank}").open("a").write("|")
    (notes / f"process-{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    main()


def bare_rank(rank: int, count: int, port: int, notes: Path, arguments: tuple[str, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command(notes, *arguments)


def start(count: int, notes: Path, *arguments: str) -> list[Any]:
    notes.mkdir()
    port = ranks.free_port()
    found = [ranks.CONTEXT.Process(target=bare_rank, args=(r, count, port, notes, arguments)) for r in range(count)]
    for each in found:
        each.start()
    return found


def steps_done(folder: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    there = (folder / "checkpoints" / "last.pt").exists()
    return ranks.state_of(folder)["progress"]["step"] if there else 0


def wait_for_step(folder: Path, after: int, seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while steps_done(folder) <= after:
        assert time.monotonic() < end, f"no checkpoint beyond step {after}"
        time.sleep(0.01)


def said(notes: Path, rank: int) -> str:
    return (notes / f"said-{rank}").read_text()


def test_a_rank_that_is_killed_ends_the_run_with_a_line_that_names_it(tmp_path):
    notes, folder = tmp_path / "notes", tmp_path / "run"
    started = start(3, notes, *OVERRIDES, f"run_dir={folder}", "trainer.steps=100000")
    wait_for_step(folder, 0)
    started[1].kill()
    codes = ranks.ended(started)
    assert codes[1] == -signal.SIGKILL and codes[0] == codes[2] == 1
    lines = [line for rank in (0, 2) for line in said(notes, rank).splitlines() if "was killed" in line]
    (line,) = lines
    assert line.startswith(f"rank 1 (process {started[1].pid} on ")
    assert line.endswith(f"ended without a word; mlframework-train run_dir={folder} resume=true goes on")


def ends_with_open_connections(notes: Path) -> None:
    """Rank 0 says why it ends, but something still holds its connections; rank 1 waits for it."""
    if processes.leads():
        kept, began = torch.distributed.group.WORLD, time.monotonic()
        processes.tell("enough", lost=False)
        (notes / "seconds").write_text(str(time.monotonic() - began))
        os._exit(0 if kept is not None else 1)  # no connection is closed before
    with pytest.raises(processes.RankFailed) as failure:
        processes.summed(torch.zeros(1))
    (notes / "heard").write_text(str(failure.value))
    processes.tell(str(failure.value), lost=True)
    os._exit(0)


def test_a_rank_that_waits_hears_why_another_ended_though_their_connection_is_open(tmp_path):
    ranks.run(2, ends_with_open_connections, tmp_path)
    assert (tmp_path / "heard").read_text() == "enough"
    assert float((tmp_path / "seconds").read_text()) < processes.LEAVE / 2, "rank 0 did not wait for rank 1 alone"


def test_a_mistake_of_all_ranks_is_told_once(tmp_path):
    notes = tmp_path / "notes"
    started = start(2, notes, *OVERRIDES, f"run_dir={tmp_path / 'run'}", "task.k_shot=0")
    assert ranks.ended(started) == [2, 2]
    assert said(notes, 0).count("task.k_shot=0: must be a whole number of at least 1") == 1 and not said(notes, 1)
    assert not (tmp_path / "run").exists()


def kill(number: Path) -> None:
    """Kills the process whose number stands in a file; one that is just being started again has none yet."""
    while True:
        with suppress(ProcessLookupError, ValueError):
            return os.kill(int(number.read_text()), signal.SIGKILL)
        time.sleep(0.01)


def wait_for_attempt(notes: Path, count: int, seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while min(len((notes / f"attempts-{rank}").read_text()) for rank in range(2)) < count:
        assert time.monotonic() < end, f"the ranks were not started {count} times"
        time.sleep(0.01)


def kill_now_and_then(folder: Path, notes: Path, killed: list[int]) -> None:
    """Kills one of two ranks at random moments after the run went on beyond its last end."""
    chance, reached = random.Random(0), 0
    for attempt in range(1, KILLS + 1):
        wait_for_step(folder, reached)
        time.sleep(chance.uniform(0, 0.05))
        rank = chance.randrange(2)
        kill(notes / f"process-{rank}")
        killed.append(rank)
        wait_for_attempt(notes, attempt + 1)  # until then the other rank may write a checkpoint still
        reached = steps_done(folder)


def agent(notes: Path, *arguments: str) -> None:
    """What `torchrun --standalone --nproc-per-node=2 --max-restarts=10` does, without importing torch each time."""
    notes.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="kills",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=KILLS,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    elastic_launch(config, command)(notes, *arguments)


def batch_script(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Starts the script of docs/scale.md in a folder; a `scontrol` there notes that it was called."""
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    (script,) = (block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "scontrol" in block)
    tool = folder / "scontrol"
    tool.write_text('#!/bin/sh\necho "$@" >> requeued\n')
    tool.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    typed = " ".join(f"'{each}'" for each in overrides)
    script = script.replace("resume=$resume", f"resume=$resume {typed}")
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7"},
            stdout=said,
            stderr=said,
        )


def test_the_batch_script_for_torchrun_goes_on_with_what_got_further_and_not_with_a_wrong_setting(tmp_path):
    (tmp_path / "runs").mkdir()
    job = batch_script(tmp_path, *OVERRIDES, "trainer.steps=1000000", "schedule=constant")
    wait_for_step(tmp_path / "runs" / "two", 0)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 1, "torchrun's code for any end"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert batch_script(tmp_path, *OVERRIDES, "task.k_shot=0").wait(120) == 1
    assert "task.k_shot=0: " in (tmp_path / "said").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_one_of_two_ranks_killed_ten_times_under_max_restarts_ends_as_an_undisturbed_run(tmp_path):
    arguments = (*OVERRIDES, "trainer.steps=800")
    agent(tmp_path / "calm", *arguments, f"run_dir={tmp_path / 'whole'}")
    killed: list[int] = []
    notes, folder = tmp_path / "notes", tmp_path / "killed"
    killer = threading.Thread(target=kill_now_and_then, args=(folder, notes, killed), daemon=True)
    killer.start()
    agent(notes, *arguments, f"run_dir={folder}")
    assert len(killed) == KILLS and set(killed) == {0, 1}
    assert (notes / "attempts-0").read_text() == (notes / "attempts-1").read_text() == "|" * (KILLS + 1)
    whole, found = ranks.state_of(tmp_path / "whole"), ranks.state_of(folder)
    for state in (whole, found):
        del state["progress"]["seconds"]
    assert str(found) == str(whole) and len(found["ranks"]) == 1
    assert all(torch.equal(found["meta_layer"][name], value) for name, value in whole["meta_layer"].items())
    best = [(each / "checkpoints" / "best.safetensors").read_bytes() for each in (tmp_path / "whole", folder)]
    assert best[0] == best[1]
    results = [json.loads((each / "result.json").read_text())["validation"] for each in (tmp_path / "whole", folder)]
    assert results[0] == results[1]
