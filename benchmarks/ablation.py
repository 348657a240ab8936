"""What each speed mechanism buys: `python benchmarks/ablation.py [--only W1 ...] [--modes captured] [--json FILE]`.

Every mechanism is switched off alone, in a process of its own with one thread. The processes of one workload and mode
take turns, so that a drifting machine slows all alike, and count CPU time, so that other work on the machine matters
less. The gain is the median, over turns, of the time without the mechanism divided by the time with everything on:
1.00x means that it gains nothing.

With `PYTHONPATH` set to another checkout, its package is measured. A mechanism that a checkout lacks is left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import CONTENDERS, ours
from rich.console import Console
from rich.table import Table
from solvers import machine
from steps import Step
from torch import Tensor, nn
from turns import ANSWERS, TURN, LeftOut, Player, playing
from workloads import WORKLOADS, Workload

from mlframework.backend.algorithm import tensors_of
from mlframework.files import write_json

ROUNDS = 15
EVERYTHING = "everything"
EAGER, CAPTURED, FIRST_ORDER = MODES = ("eager", "captured", "first order")

#: The workloads of the table, and those where a mechanism for long inner loops is seen.
MEASURED = (
    "W1-sinusoid-25x1",
    "W1-sinusoid-256x1",
    "W2-strided-4x5",
    "W2-strided-32x1",
    "W4-text-0.2M-16x3",
    "W5-prototypes-8",
    "W5-svm-8",
)
IMAGES, MLPS, TEXT, ALL = ("W2", "W5"), ("W1",), ("W4",), ("W",)


class Mechanism(NamedTuple):
    """Something that makes steps fast, and how to do without it.

    Attributes:
        patches: `module:attribute` to the plain replacement, which may be built from the original.
        sources: `module` or `module:attribute`, whose lines would go.
        modes: where it is at work.
        workloads: the first letters of those where it is at work.
    """

    patches: dict[str, Callable[[Any], Any]]
    sources: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    workloads: tuple[str, ...] = ALL

    def switch_off(self) -> None:
        """Puts the plain replacements in place.

        Raises:
            LeftOut: this checkout has no such mechanism.
        """
        for path, replacement in self.patches.items():
            owner, name = found(path)
            setattr(owner, name, replacement(getattr(owner, name)))


def found(path: str) -> tuple[Any, str]:
    """The object that holds what a path names, and its name there."""
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    try:
        owner = importlib.import_module(f"mlframework.{module}")
        for part in owners:
            owner = getattr(owner, part)
        getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise LeftOut(f"not here: {error}") from error
    return owner, name


def lines(sources: Sequence[str]) -> int:
    """How many lines of code there are at some places; those that a checkout lacks count as none."""
    total = 0
    for source in sources:
        with suppress(LeftOut, ImportError, TypeError):
            thing: Any = importlib.import_module(f"mlframework.{source.partition(':')[0]}")
            if ":" in source:
                owner, name = found(source)
                thing = getattr(owner, name)
            total += len(inspect.getsourcelines(thing)[0])
    return total


def constant(value: Any) -> Callable[[Any], Any]:
    """Replaces by a value."""
    return lambda original: value


def returning(value: Any) -> Callable[[Any], Any]:
    """Replaces by a function that returns a value."""
    return lambda original: lambda *args, **kwargs: value


def plain_stacks(base_layer: nn.Module, names: Sequence[str], num_tasks: int) -> dict[str, Tensor]:
    held = dict(base_layer.named_parameters())  # not `get_parameter`: while tracing they are tensors
    return {name: held[name].expand(num_tasks, *held[name].shape) for name in names}


def plain_rotations(x: Tensor, count: int, width: int, base: float) -> Tensor:
    rates = base ** -(torch.arange(0, width, 2, device=x.device, dtype=x.dtype) / width)
    turns = torch.arange(count, device=x.device).unsqueeze(-1) * rates
    return torch.stack([turns.cos(), turns.sin()])


def plain_causal(x: Tensor, length: int, read: int) -> Tensor:
    hidden = torch.ones(length, read, dtype=torch.bool, device=x.device).triu(read - length + 1)
    return torch.zeros(length, read, dtype=x.dtype, device=x.device).masked_fill(hidden, torch.finfo(x.dtype).min / 2)


def without_setting(*names: str) -> Callable[[Any], Any]:
    """Leaves settings out of those for inductor."""

    def replacement(original: Any) -> Any:
        def settings(*args: Any) -> dict[str, Any]:
            return {name: value for name, value in original(*args).items() if name not in names}

        return settings

    return replacement


TRANSFORMER = "base_layers.transformer"


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`normalise` from mean and variance."""
    axes, per_channel = (1, *range(3, x.dim())), (len(x), 1, -1, *(1 for _ in x.shape[3:]))
    centred = x - x.mean(axes, keepdim=True)
    scale = weight.view(per_channel) * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    return torch.addcmul(bias.view(per_channel), centred, scale)


MECHANISMS: dict[str, Mechanism] = {
    "stacked layers": Mechanism(
        {"backend.stacked:supports": returning(False)}, ("backend.stacked",), workloads=(*MLPS, *TEXT)
    ),
    "transposed weights": Mechanism(
        {"meta_layers.gradient_descent.maml:repeated": constant(plain_stacks)},
        ("backend.stacked:repeated",),
        workloads=(*MLPS, *TEXT),
    ),
    "unfolded convolutions": Mechanism(
        {"backend.convolve:pays_unfolded": returning(False)},
        ("backend.convolve",),
        modes=(CAPTURED,),
        workloads=IMAGES,
    ),
    "convolutions task by task": Mechanism(
        {"backend.convolve:pays_unfolded": returning(True)},
        ("backend.convolve:in_turn",),
        modes=(CAPTURED,),
        workloads=IMAGES,
    ),
    "batch norm in closed form": Mechanism(
        {"backend.stacked:normalise": constant(plain_norm)}, ("backend.normalise",), workloads=IMAGES
    ),
    "tables": Mechanism(
        {f"{TRANSFORMER}:rotations": constant(plain_rotations), f"{TRANSFORMER}:later": constant(plain_causal)},
        ("backend.forward:table",),
        workloads=TEXT,
    ),
    "fused Adam's kernel": Mechanism(
        {"training.outer_loop:optimizer_step": constant(lambda optimizer: optimizer.step())},
        ("backend.optimizer_step",),
        modes=(EAGER, CAPTURED),
        workloads=(*MLPS, "W5"),
    ),
    "allocator": Mechanism({"backend.machine:tune": returning(False)}, ("backend.machine:tune",)),
    "merged products": Mechanism(
        {"backend.regions:merge_products": returning(None)},
        ("backend.graph_passes",),
        modes=(CAPTURED,),
        workloads=(*MLPS, "W5"),
    ),
    "layout pass": Mechanism(
        {"backend.inductor:lay_out": returning(None)}, ("backend.graph_passes:lay_out",), modes=(CAPTURED,)
    ),
    "sinking pass": Mechanism(
        {"backend.regions:sink": returning(None)},
        ("backend.graph_passes:sink",),
        modes=(CAPTURED,),
        workloads=("W2", "W3", "W4"),
    ),
    "recomputation": Mechanism(
        {
            "backend.regions:partition": lambda partition: (
                lambda graph, outputs, keep_all: partition(graph, outputs=outputs, keep_all=True)
            )
        },
        (),
        modes=(CAPTURED,),
        workloads=("W2", "W3", "W4"),
    ),
    "regions": Mechanism(
        {"backend.capture:MOST_OPERATIONS": constant(10**9)},
        ("backend.regions",),
        modes=(CAPTURED,),
        workloads=("W1-sinusoid-25x20", "W2-strided-32x1"),
    ),
    "tasks that fit in cache": Mechanism(
        {"backend.plan:CACHE_BYTES": constant(1e15)},
        ("backend.plan:Planner.for_compiled_steps",),
        modes=(CAPTURED,),
        workloads=("W1-sinusoid-256", "W2", "W4", "W5"),
    ),
    "C++ wrapper": Mechanism(
        {"backend.inductor:inductor_settings": without_setting("cpp_wrapper")}, (), (CAPTURED,), MLPS
    ),
    "vectorising flag": Mechanism(
        {"backend.inductor:inductor_settings": without_setting("cpp.march")}, (), (CAPTURED,), ("W1", "W2", "W3", "W4")
    ),
    "contraction": Mechanism(
        {"backend.inductor:inductor_settings": without_setting("cpp.enable_floating_point_contract_flag")},
        (),
        (CAPTURED,),
        ("W1", "W2", "W4"),
    ),
    "direct calls": Mechanism(
        {"backend.inductor:CompiledGraph.__call__": constant(lambda self, inputs: self.code(inputs))},
        (),
        (CAPTURED,),
        MLPS,
    ),
    "remembered places": Mechanism(
        {
            "backend.algorithm:Held.__init__": constant(lambda self, module: vars(self).update(module=module)),
            "backend.algorithm:Held.__call__": constant(lambda self: [*tensors_of(self.module).values()]),
        },
        ("backend.algorithm:Held",),
        (CAPTURED,),
        MLPS,
    ),
    "remembered indices": Mechanism(
        {"backend.inductor:remember_indices": returning(None)},
        ("backend.private:remember_indices",),
        (CAPTURED,),
        ("W2-strided-4", "W4"),
    ),
}


def step_without(mechanism: str, mode: str, workload: Workload) -> Step:
    """An outer step, a mechanism switched off."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # on any core: CPU time is what counts
    if mechanism != EVERYTHING:
        MECHANISMS[mechanism].switch_off()
    return ours(workload, capture="true" if mode == CAPTURED else "false")


#: Each process of `turns` finds its step here; a spawned one imports this module as well.
CONTENDERS.update(  # type: ignore[attr-defined]
    {
        f"{mode} without {name}": functools.partial(step_without, name, mode)
        for mode in MODES
        for name in (EVERYTHING, *MECHANISMS)
    }
)


def cpu_turn(step: Step) -> float:
    """CPU seconds of a step, the mean of as many as a turn takes."""
    calls, began = 0, time.process_time()
    while time.process_time() - began < TURN:
        step()
        calls += 1
    return (time.process_time() - began) / calls


ANSWERS["cpu turn"] = cpu_turn  # type: ignore[index]


def measure(workload: Workload, mode: str, names: Sequence[str], *, rounds: int, limit: float) -> list[dict[str, Any]]:
    """A record for each mechanism of a workload in a mode."""
    workload = workload._replace(first_order=mode == FIRST_ORDER)
    records: list[dict[str, Any]] = []
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        players: dict[str, Player] = {}
        for name in (EVERYTHING, *names):
            record = {"workload": workload.name, "mode": mode, "mechanism": name}
            records.append(record)
            cache = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            settings = {"threads": 1, "cache": cache, "limit": limit}
            player = stack.enter_context(playing(f"{mode} without {name}", workload, **settings))
            try:
                first = player.ask("first step")
                if first["warned"]:
                    raise LeftOut(first["warned"][0])
                record["first"] = first["seconds"]
                player.ask("warm-up")
                players[name], times[name] = player, []
            except LeftOut as error:
                player.stop()
                record["left_out"] = " ".join(str(error).split())[:200]
            print(workload.name, mode, name, record.get("left_out", f"{record.get('first', 0):.1f} s"), flush=True)
        for _ in range(rounds):
            for name, player in players.items():
                times[name].append(player.ask("cpu turn"))
    for record in records:
        if name_times := times.get(record["mechanism"]):
            ratios = [t / base for t, base in zip(name_times, times[EVERYTHING], strict=True)]
            record.update(seconds=statistics.median(name_times), gain=statistics.median(ratios), turns=len(ratios))
    return records


def at_work(workload: str, mode: str, asked: Sequence[str] | None) -> list[str]:
    """The mechanisms that a workload is measured without."""
    return [
        name
        for name, mechanism in MECHANISMS.items()
        if mode in mechanism.modes and workload.startswith(mechanism.workloads) and (not asked or name in asked)
    ]


def show(records: list[dict[str, Any]]) -> Table:
    """A row for each mechanism, a column for each workload and mode."""
    columns = list(dict.fromkeys((r["workload"], r["mode"]) for r in records))
    table = Table("mechanism", "lines", *(f"{workload} {mode}" for workload, mode in columns))
    for name in (EVERYTHING, *MECHANISMS):
        cells = {(r["workload"], r["mode"]): r for r in records if r["mechanism"] == name}
        if cells:
            row = [shown(cells.get(column), name) for column in columns]
            table.add_row(name, str(lines(MECHANISMS[name].sources)) if name in MECHANISMS else "", *row)
    return table


def shown(record: dict[str, Any] | None, name: str) -> str:
    if record is None or "seconds" not in record:
        return "" if record is None else "-"
    return f"{record['seconds'] * 1e3:.3g} ms" if name == EVERYTHING else f"{record['gain']:.2f}x"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="workloads whose names start so")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--mechanisms", nargs="+", choices=list(MECHANISMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each process")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a first step, imports included")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the result goes; what it holds already is kept"
    )
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    names = asked.only or MEASURED
    for workload in (w for w in WORKLOADS if w.name.startswith(tuple(names))):
        for mode in asked.modes:
            if mode == FIRST_ORDER and workload.head is not None:
                continue
            wanted = at_work(workload.name, mode, asked.mechanisms)
            records += measure(workload, mode, wanted, rounds=asked.rounds, limit=asked.limit)
            if asked.json is not None:
                result = {
                    "machine": machine([]),
                    "threads": 1,
                    "lines": {n: lines(m.sources) for n, m in MECHANISMS.items()},
                }
                write_json(asked.json, {**result, "cells": records})
    Console(width=200).print(show(records))


if __name__ == "__main__":
    main()
