"""One outer step of MAML, ours beside others': `python benchmarks/outer_step.py [--quick] [--threads N] [--json FILE]`.

A step is the exact meta-gradient over a meta-batch and Adam's update. Each contender lives in a process of its own, and
they take turns, so that a drifting machine slows all alike. Before the clock runs, every contender's meta-gradient is
compared with that of the plain loop; one that differs is reported and not timed. What is not installed is named and
left out: `pip install -e '.[bench]'` brings higher, TorchOpt and JAX. learn2learn 0.2.0 does not build on today's
Python; the algorithms of its source distribution need no building:

    pip download --no-deps --no-build-isolation --no-binary :all: learn2learn==0.2.0   # or from pypi.org by hand
    tar xzf learn2learn-0.2.0.tar.gz
    LEARN2LEARN=learn2learn-0.2.0 python benchmarks/outer_step.py
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from solvers import machine
from torch import Tensor, nn

from mlframework.base_layers import MLP, BaseLayer, Conv4
from mlframework.engine import Engine
from mlframework.episode import Episode
from mlframework.files import atomic
from mlframework.inner_updates import SGD
from mlframework.meta_layers.gradient_descent import MAML, Exact
from mlframework.outer_loop import meta_gradient
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TaskDistribution

INNER_LR, OUTER_LR = 0.01, 1e-3
#: Relative difference of a whole meta-gradient, in float32, that rounding can explain.
TOLERANCE = 1e-3
ROUNDS, QUICK_ROUNDS = 15, 5
#: A turn repeats a fast step for as long, in seconds.
TURN = 0.05
PLAIN = "plain loop"


class Workload(NamedTuple):
    """What is learned, and on how many tasks and inner steps."""

    name: str
    tasks: int
    inner_steps: int

    def task(self) -> TaskDistribution:
        """Waves, or 5-way 1-shot on 28x28 noise: what is timed does not depend on what is learned."""
        if self.name == "sinusoid":
            return Sinusoid()
        data = ClassIndexed.from_labels(torch.rand(400, 1, 28, 28), torch.arange(20).repeat(20))
        return ArrayTasks({"train": data}, n_way=5, k_shot=1, k_query=15 if self.name == "pooled" else 1)

    def make(self) -> tuple[TaskDistribution, BaseLayer, Episode]:
        """The same weights and the same meta-batch in every process."""
        torch.manual_seed(0)
        task = self.task()
        if self.name == "sinusoid":
            base_layer: BaseLayer = MLP(task.spec)
        else:
            base_layer = Conv4(task.spec, downsample="pool" if self.name == "pooled" else "stride")
        return task, base_layer, task.sample(self.tasks, "train", torch.Generator().manual_seed(0))


#: The sinusoid's MLP 40-40, MAML's strided Conv4-64 with one query a class, and the pooled one with fifteen.
WORKLOADS = (
    Workload("sinusoid", 1, 1),
    Workload("sinusoid", 25, 1),
    Workload("sinusoid", 256, 1),
    Workload("sinusoid", 25, 5),
    Workload("strided", 4, 5),
    Workload("strided", 32, 1),
    Workload("pooled", 4, 5),
)
QUICK = (WORKLOADS[1], WORKLOADS[3], WORKLOADS[4])

#: Takes a step, and returns the meta-gradient it took, in the order of the base layer's parameters.
Step = Callable[[], list[np.ndarray]]


def ours(workload: Workload, engine: Engine) -> Step:
    task, base_layer, episode = workload.make()
    rule = functools.partial(SGD, lr=INNER_LR)
    layer = MAML(base_layer, task, update=rule, meta_gradient=Exact(), inner_steps=workload.inner_steps)
    layer.engine = engine
    optimizer = torch.optim.Adam(layer.parameters(), lr=OUTER_LR)

    def step() -> list[np.ndarray]:
        meta_gradient(layer, episode)
        optimizer.step()
        return gradients(base_layer)

    return step


def task_losses(task: TaskDistribution) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of one task."""
    return F.mse_loss if task.spec.kind == "regression" else F.cross_entropy


def gradients(module: nn.Module) -> list[np.ndarray]:
    return [p.grad.numpy() for p in module.parameters() if p.grad is not None]


def loop(workload: Workload, query_loss: Callable[..., Tensor], module: nn.Module | None = None) -> Step:
    """A step that goes through the tasks one after another.

    Args:
        workload: what is learned.
        query_loss: of one task; takes the module, the loss, and the task's support x, y and query x, y.
        module: stands in for the base layer; shares its parameters.
    """
    task, base_layer, episode = workload.make()
    loss_of = task_losses(task)
    module = base_layer if module is None else module
    optimizer = torch.optim.Adam(module.parameters(), lr=OUTER_LR)
    (sx, sy, _), (qx, qy, _) = episode

    def step() -> list[np.ndarray]:
        optimizer.zero_grad()
        for examples in zip(sx, sy, qx, qy, strict=True):
            (query_loss(module, loss_of, *examples) / workload.tasks).backward()
        optimizer.step()
        return gradients(module)

    return step


def plain_loop(workload: Workload) -> Step:
    """What a researcher writes by hand."""

    def query_loss(module: nn.Module, loss_of: Any, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        params = dict(module.named_parameters())
        for _ in range(workload.inner_steps):
            loss = loss_of(torch.func.functional_call(module, params, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - INNER_LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return loss_of(torch.func.functional_call(module, params, (qx,)), qy)

    return loop(workload, query_loss)


def with_learn2learn(workload: Workload) -> Step:
    """`learn2learn.algorithms.MAML`, from the unpacked source distribution that LEARN2LEARN names."""
    folder = Path(os.environ.get("LEARN2LEARN", "learn2learn-0.2.0")) / "learn2learn"
    if not (folder / "algorithms" / "maml.py").exists():
        raise ModuleNotFoundError("No module named 'learn2learn'")
    for name in ("learn2learn", "learn2learn.algorithms"):  # their __init__ import gym and torchvision
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from learn2learn.algorithms import maml

    def query_loss(module: nn.Module, loss_of: Any, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        learner = module.clone()  # type: ignore[operator]
        for _ in range(workload.inner_steps):
            learner.adapt(loss_of(learner(sx), sy))
        return loss_of(learner(qx), qy)

    return loop(workload, query_loss, maml.MAML(workload.make()[1], lr=INNER_LR, first_order=False))


def with_higher(workload: Workload) -> Step:
    """`higher.innerloop_ctx`."""
    import higher

    def query_loss(module: nn.Module, loss_of: Any, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        inner = torch.optim.SGD(module.parameters(), lr=INNER_LR)
        with higher.innerloop_ctx(module, inner, copy_initial_weights=False) as (model, optimizer):
            for _ in range(workload.inner_steps):
                optimizer.step(loss_of(model(sx), sy))
            return loss_of(model(qx), qy)

    return loop(workload, query_loss)


def with_torchopt(workload: Workload) -> Step:
    """`torchopt.MetaSGD`, with the state taken and put back around each task."""
    import torchopt

    def query_loss(module: nn.Module, loss_of: Any, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        inner = torchopt.MetaSGD(module, lr=INNER_LR)
        start = torchopt.extract_state_dict(module, by="reference")
        for _ in range(workload.inner_steps):
            inner.step(loss_of(module(sx), sy))
        loss = loss_of(module(qx), qy)
        torchopt.recover_state_dict(module, start)
        return loss

    return loop(workload, query_loss)


def with_jax(workload: Workload) -> Step:
    """By hand in JAX, jitted whole: the MLP by vmap over tasks, convolutions by map over tasks and as im2col."""
    import jax
    import jax.numpy as jnp

    task, base_layer, episode = workload.make()
    params = [jnp.asarray(p.detach().numpy()) for p in base_layer.parameters()]
    data = [jnp.asarray(leaf.numpy()) for part in episode for leaf in (part.x, part.y)]

    def block(x: Any, weight: Any, bias: Any, scale: Any, shift: Any) -> Any:
        pooled = workload.name == "pooled"
        strides = (1, 1) if pooled else (2, 2)
        columns = jax.lax.conv_general_dilated_patches(x, (3, 3), strides, ((1, 1), (1, 1)))  # [n, c 9, h, w]
        x = jnp.einsum("ok,nkhw->nohw", weight.reshape(len(weight), -1), columns) + bias[:, None, None]
        centred = x - x.mean((0, 2, 3), keepdims=True)
        variance = jnp.square(centred).mean((0, 2, 3), keepdims=True)
        x = centred * (scale[:, None, None] * jax.lax.rsqrt(variance + 1e-5)) + shift[:, None, None]
        if pooled:
            n, c, h, w = x.shape
            x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
        return jax.nn.relu(x)

    def model(params: list[Any], x: Any) -> Any:
        if workload.name == "sinusoid":
            for index in range(0, len(params) - 2, 2):
                x = jax.nn.relu(x @ params[index].T + params[index + 1])
        else:
            for index in range(0, len(params) - 2, 4):
                x = block(x, *params[index : index + 4])
            x = x.reshape(len(x), -1) if workload.name == "pooled" else x.mean((2, 3))
        return x @ params[-2].T + params[-1]

    def loss_of(params: list[Any], x: Any, y: Any) -> Any:
        if task.spec.kind == "regression":
            return jnp.square(model(params, x) - y).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(model(params, x)), y[:, None], 1).mean()

    def query_loss(params: list[Any], sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        for _ in range(workload.inner_steps):
            grads = jax.grad(loss_of)(params, sx, sy)
            params = [p - INNER_LR * g for p, g in zip(params, grads, strict=True)]
        return loss_of(params, qx, qy)

    def all_tasks(params: list[Any]) -> Any:
        grads = jax.grad(query_loss)
        if workload.name == "sinusoid":
            each = jax.vmap(grads, (None, 0, 0, 0, 0))(params, *data)
        else:
            each = jax.lax.map(lambda examples: grads(params, *examples), tuple(data))
        return [g.mean(0) for g in each]

    @jax.jit
    def outer(params: list[Any], first: list[Any], second: list[Any], count: Any) -> Any:
        grads, count = all_tasks(params), count + 1
        first = [0.9 * m + 0.1 * g for m, g in zip(first, grads, strict=True)]
        second = [0.999 * v + 0.001 * g * g for v, g in zip(second, grads, strict=True)]
        moved = [
            p - OUTER_LR * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
            for p, m, v in zip(params, first, second, strict=True)
        ]
        return grads, moved, first, second, count

    state: list[Any] = [params, [p * 0 for p in params], [p * 0 for p in params], jnp.zeros(())]

    def step() -> list[np.ndarray]:
        grads, *state[:] = jax.block_until_ready(outer(*state))
        return [np.asarray(g) for g in grads]

    return step


CONTENDERS: Mapping[str, Callable[[Workload], Step]] = {
    PLAIN: plain_loop,
    "vectorised": functools.partial(ours, engine="vectorised"),
    "loop": functools.partial(ours, engine="loop"),
    "learn2learn": with_learn2learn,
    "higher": with_higher,
    "TorchOpt": with_torchopt,
    "JAX jit": with_jax,
}


def live(name: str, workload: Workload, threads: int, connection: Connection) -> None:
    """A contender's process: prepares a step, sends its first meta-gradient, then times turns as it is asked to."""
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    )
    with contextlib.suppress(AttributeError):  # JAX takes as many threads as it sees cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    try:
        step = CONTENDERS[name](workload)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        gradient = np.concatenate([g.ravel() for g in step()]).astype(np.float64)
        first = time.perf_counter() - began
    except Exception as error:
        connection.send(error if isinstance(error, ImportError) else RuntimeError(f"{type(error).__name__}: {error}"))
        return
    connection.send((gradient, first))
    for _ in range(2):
        step()
    while connection.recv():
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < TURN:
            step()
            calls += 1
        connection.send((time.perf_counter() - began) / calls)
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def compare(workload: Workload, names: list[str], threads: int, rounds: int) -> list[dict[str, Any]]:
    """A record for each contender: seconds of a step (median over turns), of the first one, and MB above the start."""
    context = multiprocessing.get_context("spawn")
    records, running = [], {}
    truth: np.ndarray | None = None
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=live, args=(name, workload, threads, there), daemon=True)
        process.start()
        there.close()
        record: dict[str, Any] = {**workload._asdict(), "contender": name}
        records.append(record)
        try:
            found = here.recv()
        except EOFError:
            found = RuntimeError("its process died")
        if isinstance(found, Exception):
            record["left_out"] = str(found)
            continue
        gradient, record["first"] = found
        truth = gradient if truth is None else truth
        record["difference"] = float(np.linalg.norm(gradient - truth) / np.linalg.norm(truth))
        if record["difference"] > TOLERANCE:
            record["left_out"] = f"its meta-gradient is {record['difference']:.1e} off"
            here.send(False)
        else:
            running[name] = (here, process, record)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (here, _, _) in running.items():
            here.send(True)
            times[name].append(here.recv())
    for name, (here, process, record) in running.items():
        here.send(False)
        record["seconds"], record["mb"] = statistics.median(times[name]), here.recv()
        process.join()
    return records


def show(records: list[dict[str, Any]]) -> Table:
    """A row for each contender of a workload, with its ratio to the plain loop."""
    name, tasks, steps = (records[0][key] for key in ("name", "tasks", "inner_steps"))
    table = Table(
        "contender",
        "ms a step",
        "plain loop / it",
        "first step, s",
        "MB",
        title=f"{name}, {tasks} tasks, {steps} steps",
    )
    plain = next((r["seconds"] for r in records if r["contender"] == PLAIN and "seconds" in r), float("nan"))
    for r in records:
        if "seconds" in r:
            cells = (f"{r['seconds'] * 1e3:.2f}", f"{plain / r['seconds']:.1f}x", f"{r['first']:.2f}", f"{r['mb']:.0f}")
            table.add_row(r["contender"], *cells)
        else:
            table.add_row(r["contender"], r["left_out"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three workloads, fewer turns")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for every contender")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, cells = Console(), []
    for workload in QUICK if options.quick else WORKLOADS:
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
        records = compare(workload, list(CONTENDERS), options.threads, rounds)
        console.print(show(records))
        cells += records
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with atomic(options.json) as part:
            part.write_text(json.dumps({"machine": machine([]), "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
