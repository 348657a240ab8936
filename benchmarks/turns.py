"""Contenders in processes of their own that take turns, for outer_step.py.

None of them can hang the others: who does not answer in time is killed, with all that it started, and named.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import CAPTURED, CONTENDERS, INEXACT, JAX, PLAIN, cannot
from steps import Step
from torch.utils.flop_counter import FlopCounterMode
from workloads import Workload

from mlframework.backend.machine import synchronise

__all__ = ["TOLERANCE", "TURN", "compare"]

#: Relative difference of a whole meta-gradient in float32 from that in float64 which rounding explains. Whoever is
#: further off, as deep networks with many kinks may be, takes the step in float64 as well, and is judged by that.
TOLERANCE, DOUBLE_TOLERANCE = 1e-3, 1e-6
#: A turn repeats a fast step for as long, in seconds.
TURN = 0.05
#: Turns of each at least, and seconds after which there are no more.
LEAST_TURNS, PATIENCE = 3, 90.0
#: Seconds that a process has to end by itself.
GRACE = 3.0
#: Steps between the first one and the turns.
WARM_UP = 2
#: The name of the product of square float32 matrices that takes turns with the contenders.
GEMM = "GEMM"
TRUTH = "truth"


class LeftOut(Exception):
    """Why a contender does not compete."""


class Player:
    """A contender in a process of its own, which does what it is asked, or is killed.

    Args:
        name: of the contender.
        workload: what is learned.
        threads: of the CPU, and cores that the process may use.
        cache: the folder for what is compiled or measured.
        limit: seconds that any answer may take.
    """

    def __init__(self, name: str, workload: Workload, *, threads: int, cache: str, limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.limit = limit
        self.connection, there = context.Pipe()
        # Not a daemon, which may have no processes of its own: `stop` ends it.
        self.process = context.Process(target=live, args=(name, workload, threads, cache, there))
        self.process.start()
        there.close()

    def ask(self, what: str) -> Any:
        """The answer to one of `ANSWERS`.

        Raises:
            LeftOut: it failed, died, or took too long; it is stopped.
        """
        try:
            self.connection.send(what)
            if not self.connection.poll(self.limit):
                raise LeftOut(f"no answer to {what!r} in {self.limit:.0f} s")
            well, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(1)
            raise LeftOut(f"its process died (exit code {self.process.exitcode})") from None
        if not well:
            raise LeftOut(answer)
        return answer

    def stop(self) -> None:
        """Ends the process and all that it started: gently where it listens, else by force."""
        if self.connection.closed:
            return
        self.connection.close()
        self.process.join(GRACE)
        with contextlib.suppress(ProcessLookupError):  # it has ended, or has not yet come to have a group of its own
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def playing(*args: Any, **settings: Any) -> Iterator[Player]:
    """A player that is stopped in the end."""
    player = Player(*args, **settings)
    try:
        yield player
    finally:
        player.stop()


def live(name: str, workload: Workload, threads: int, cache: str, connection: Connection) -> None:
    """A contender's process: builds its step, then answers what it is asked, until it is stopped."""
    os.setsid()
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["MLFRAMEWORK_CACHE"] = cache
    with contextlib.suppress(AttributeError):  # JAX takes as many threads as it sees cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as products of matrices have it: float32
    warnings.simplefilter("ignore")  # the contenders' own, about versions of what they stand on
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - qpth prints; it is open until the process ends
    try:
        step = (products if name == GEMM else CONTENDERS[name])(workload)
        while True:
            connection.send((True, ANSWERS[connection.recv()](step)))
    except EOFError:  # the parent is gone
        return
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        connection.send((False, str(error) if missing else f"{type(error).__name__}: {error}"))


def first(step: Step) -> dict[str, Any]:
    """The first step: its meta-gradient, its time, the memory before it, and what capture had to say."""
    said = Said()
    before, began = memory("VmHWM"), time.perf_counter()
    gradient = whole(step())
    seconds = time.perf_counter() - began
    return {"gradient": gradient, "seconds": seconds, "mb_before": before, "warned": said.warnings, "said": said.lines}


def warm_up(step: Step) -> dict[str, float]:
    """Takes some steps; what the peak of memory was until then, first step and compilation included."""
    for _ in range(WARM_UP):
        step()
    peak = memory("VmHWM")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # from here on the peak is that of steps alone, where the system lets us
        Path("/proc/self/clear_refs").write_text("5")
    return {"mb_peak": peak}


def turn(step: Step) -> float:
    """Seconds of a step, the mean of as many as a turn takes."""
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < TURN:
        step()
        calls += 1
    synchronise()
    return (time.perf_counter() - began) / calls


def truth(step: Step) -> tuple[np.ndarray, int]:
    """A step's meta-gradient, and its floating-point operations by torch's count of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        gradient = whole(step())
    return gradient, counter.get_total_flops()


def whole(gradient: list[Any]) -> np.ndarray:
    parts = [part.cpu().numpy() if isinstance(part, torch.Tensor) else part for part in gradient]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float64)


ANSWERS: Mapping[str, Callable[[Step], Any]] = {
    "first step": first,
    "warm-up": warm_up,
    "turn": turn,
    "truth": truth,
    "memory": lambda step: memory("VmHWM"),
}


class Said(logging.Handler):
    """Keeps what `mlframework.backend.capture` says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.warnings: list[str] = []
        logger = logging.getLogger("mlframework.backend.capture")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())


def products(workload: Workload) -> Step:
    """A step that multiplies matrices: what the machine can do."""
    a, b, out = (torch.randn(side(workload), side(workload), device=workload.device) for _ in range(3))

    def step() -> list[torch.Tensor]:
        torch.mm(a, b, out=out)
        synchronise()  # else thousands would wait in line
        return [out[:1]]

    return step


def side(workload: Workload) -> int:
    """Of the matrices whose product shows what a device can do."""
    return 1024 if workload.device == "cpu" else 8192


def memory(what: str) -> float:
    """A line of /proc/self/status in MB: `VmHWM`, the most that this process had in RAM; or, where tensors are on a
    GPU, the most that they took there.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def compare(
    workload: Workload, names: Sequence[str], *, threads: int, rounds: int, limit: float
) -> list[dict[str, Any]]:
    """A record for each contender.

    Of those that compete: `seconds` of a step (the median over turns), `first` (seconds of the first step), `mb` (by
    how much the peak of memory grew since before the first step), `mb_steps` (the same for the turns alone),
    `mb_process` (the whole peak), `difference` (of the meta-gradient, from the plain loop's in float64), `flops` (of
    the plain loop's step), `gemm_gflops` (the measured rate) and `fraction` of it. Of the captured step also
    `first_cold` and `first_warm`, with an empty and a full cache. Of the others: `left_out`, the reason.
    """
    fixed = {key: value for key, value in workload._asdict().items() if key not in ("long", "double")}
    records = {name: {**fixed, "workload": workload.name, "contender": name} for name in names}
    table = Table(workload, records, threads=threads, limit=limit)
    with table.stack:
        table.find_truth()
        table.enter(GEMM)
        for name in names:
            table.enter(name)
        table.take_turns(rounds)
        table.finish()
    return list(records.values())


class Table:
    """The players of one workload.

    Args:
        workload: what is learned.
        records: by name of the contender; they are filled.
        threads, limit: see `Player`.
    """

    def __init__(self, workload: Workload, records: dict[str, dict[str, Any]], *, threads: int, limit: float) -> None:
        self.workload, self.records = workload, records
        self.threads, self.limit = threads, limit
        self.stack = contextlib.ExitStack()
        self.players: dict[str, Player] = {}
        self.times: dict[str, list[float]] = {}
        self.truth: np.ndarray | None = None
        self.flops: int | None = None

    def find_truth(self) -> None:
        """The plain loop's meta-gradient in float64, and the operations of its step."""
        with self.leaving_out(TRUTH), tempfile.TemporaryDirectory() as cache:
            double = self.workload._replace(double=True)
            with playing(PLAIN, double, threads=self.threads, cache=cache, limit=self.limit) as player:
                self.truth, self.flops = player.ask("truth")

    def enter(self, name: str) -> None:
        """Lets a contender take its first step and compares its meta-gradient; whoever fails is left out."""
        with self.leaving_out(name):
            if name in self.records and (why := cannot(name, self.workload)):
                raise LeftOut(why)
            cache = self.stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            if name == CAPTURED:
                with playing(name, self.workload, threads=self.threads, cache=cache, limit=self.limit) as cold:
                    self.records[name]["first_cold"] = first_step(cold)["seconds"]
            player = self.stack.enter_context(
                playing(name, self.workload, threads=self.threads, cache=cache, limit=self.limit)
            )
            try:
                self.query_metrics(name, player)
            except LeftOut:
                player.stop()
                raise
            self.players[name], self.times[name] = player, []
            print(f"{self.workload.name}: {name} is ready", file=sys.stderr, flush=True)

    def judge(self, name: str, player: Player) -> None:
        """The first step and those that warm up; refuses a meta-gradient that is not the plain loop's."""
        found = first_step(player)
        if name == GEMM:
            return
        if self.truth is None:
            raise LeftOut("there is no meta-gradient to compare with")
        record = self.records[name]
        record["first"], record["mb_before"] = found["seconds"], found["mb_before"]
        if name == CAPTURED:
            record["first_warm"], record["said"] = found["seconds"], found["said"]
        record["difference"] = difference(found["gradient"], self.truth)
        if (name, self.workload.head) in INEXACT:
            record["note"] = f"its solver is inexact: its meta-gradient, {record['difference']:.1e} off, is not judged"
        elif not record["difference"] <= TOLERANCE:
            record["difference_double"] = found = self.difference_in_double(name)
            if not found <= DOUBLE_TOLERANCE:
                raise LeftOut(f"its meta-gradient is {record['difference']:.1e} off ({found:.1e} in float64)")
            record["note"] = f"its meta-gradient is {record['difference']:.1e} off, in float64 {found:.1e}: rounding"
        record.update(player.ask("warm-up"))

    def difference_in_double(self, name: str) -> float:
        """Of a contender's meta-gradient in float64, by a process of its own."""
        assert self.truth is not None
        double = self.workload._replace(double=True)
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
            playing(name, double, threads=self.threads, cache=cache, limit=self.limit) as player,
        ):
            return difference(first_step(player)["gradient"], self.truth)

    def take_turns(self, rounds: int) -> None:
        began = time.perf_counter()
        for count in range(rounds):
            if count >= LEAST_TURNS and time.perf_counter() - began > PATIENCE:
                break
            for name, player in list(self.players.items()):
                with self.leaving_out(name):
                    self.times[name].append(player.ask("turn"))

    def finish(self) -> None:
        """Fills the records."""
        rate = 2 * side(self.workload) ** 3 / statistics.median(self.times[GEMM]) if self.times.get(GEMM) else None
        for name in [name for name in self.players if name != GEMM]:
            with self.leaving_out(name):
                record, last = self.records[name], self.players[name].ask("memory")
                before, peak = record.pop("mb_before"), record.pop("mb_peak")
                if name != JAX or self.workload.device == "cpu":  # on a GPU torch counts its own
                    record["mb"], record["mb_process"] = max(peak, last) - before, max(peak, last)
                    record["mb_steps"] = last - before
                record["seconds"], record["turns"] = statistics.median(self.times[name]), len(self.times[name])
        for record in self.records.values():
            if "seconds" in record and rate and self.flops:
                fraction = self.flops / record["seconds"] / rate
                record.update(flops=self.flops, gemm_gflops=rate / 1e9, fraction=fraction)

    @contextlib.contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        """Notes why a contender fails, and goes on without it."""
        try:
            yield
        except LeftOut as error:
            if player := self.players.pop(name, None):
                player.stop()
            if name in self.records:
                self.records[name]["left_out"] = " ".join(str(error).split())[:300]


def first_step(player: Player) -> dict[str, Any]:
    """A player's first step.

    Raises:
        LeftOut: it failed, or was to be captured and was not.
    """
    found = player.ask("first step")
    if found["warned"]:
        raise LeftOut(found["warned"][0])
    return found


def difference(found: np.ndarray, truth: np.ndarray) -> float:
    """Of the whole meta-gradient, relative."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
