"""Times the outer steps of two checkouts in turns: a redesign must not make them slower.

`python benchmarks/two_checkouts.py ../old W2-strided-4x5 --capture` steps one workload with the package in `../old` and
with the one here, and prints the old time over the new one: above 1, the new one is faster. `--plain` adds the loop by
hand. Each checkout has its own environment in `.venv`, as `.ci/run` makes it; graphs are compiled in empty caches.
Times are processor seconds of one thread, medians over rounds. Processes of the same code differ by a few per cent, by
where their memory lies: `--processes 5` steps each checkout in five of them, and prints the ratio of the medians over
processes, with the fastest and the slowest process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple, cast

HERE = Path(__file__).parents[1]

#: Processor seconds of a round, about.
ROUND_SECONDS = 0.25


def play(checkout: str, workload: str, contender: str, first_order: bool) -> None:
    """Answers each number of steps on standard input with the processor seconds of a step."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[:0] = [checkout, f"{checkout}/benchmarks"]
    import torch
    from contenders import CONTENDERS
    from workloads import WORKLOADS

    torch.set_num_threads(1)
    work = next(work for work in WORKLOADS if work.name == workload)._replace(first_order=first_order)
    step = CONTENDERS[contender](work)
    for _ in range(3):
        step()
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            step()
        print((time.process_time() - began) / int(line), file=answers)


class Player(NamedTuple):
    """A process that steps a workload."""

    process: subprocess.Popen[str]

    @classmethod
    def of(cls, checkout: Path, workload: str, contender: str, first_order: bool, cache: str) -> Player:
        command = [f"{checkout}/.venv/bin/python", __file__, "--play", str(checkout), workload, contender]
        folders = {"MLFRAMEWORK_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        return cls(
            subprocess.Popen(
                [*command, *(["--first-order"] if first_order else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **folders},
            )
        )

    def seconds(self, steps: int) -> float:
        cast("IO[str]", self.process.stdin).write(f"{steps}\n")
        cast("IO[str]", self.process.stdin).flush()
        return float(cast("IO[str]", self.process.stdout).readline())


def compare(asked: argparse.Namespace, workload: str) -> None:
    """Prints the medians of a workload."""
    ours = "captured" if asked.capture else "ours"
    contenders = {"old": (asked.old.resolve(), ours), "new": (HERE, ours)}
    if asked.plain:
        contenders["plain loop"] = HERE, "plain loop"
    with TemporaryDirectory() as folder:
        players = {}
        for turn, (name, (root, contender)) in itertools.product(range(asked.processes), contenders.items()):
            players[name, turn] = Player.of(root, workload, contender, asked.first_order, f"{folder}/{name}")
            players[name, turn].seconds(1)  # the next process finds what this one compiled
        steps = {key: max(1, min(200, int(ROUND_SECONDS / player.seconds(1)))) for key, player in players.items()}
        rounds = [{key: player.seconds(steps[key]) for key, player in players.items()} for _ in range(asked.rounds)]
        for player in players.values():
            player.process.communicate()
    times = {key: statistics.median(seconds[key] for seconds in rounds) * 1e3 for key in players}
    of = {name: sorted(times[key] for key in players if key[0] == name) for name in contenders}
    medians = {name: statistics.median(each) for name, each in of.items()}
    shown = ", ".join(
        f"{name} {medians[name]:.3g} ms ({medians[name] / medians['new']:.3f}; {each[0]:.3g} ... {each[-1]:.3g})"
        for name, each in of.items()
    )
    print(f"{workload} {ours}{' first order' if asked.first_order else ''}: {shown}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--play"]:
        play(*sys.argv[2:5], "--first-order" in sys.argv)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="another checkout")
    parser.add_argument("workloads", nargs="+", help="as in workloads.py")
    parser.add_argument("--capture", action="store_true", help="compiled steps")
    parser.add_argument("--first-order", action="store_true")
    parser.add_argument("--plain", action="store_true", help="beside the loop by hand")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=1, help="of each checkout")
    asked = parser.parse_args()
    for workload in asked.workloads:
        compare(asked, workload)


if __name__ == "__main__":
    main()
