"""Who competes in outer_step.py: ours eager and captured, a loop by hand, and the libraries."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from loops import (
    REG,
    SCALE,
    C,
    in_torch,
    learn2learn_head,
    plain_head,
    plain_loop,
    with_higher,
    with_learn2learn,
    with_torchopt,
)
from steps import INNER_LR, Step, adam, gradients, task_loss
from torch import nn
from workloads import Workload

from mlframework.backend import machine
from mlframework.base_layers import BaseLayer
from mlframework.episode import Episode
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, CrammerSingerSVM, Exact, FirstOrder, LinearKernel, Prototypes, Ridge
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks import TaskDistribution
from mlframework.training.outer_loop import OuterLoop

__all__ = ["CAPTURED", "CONTENDERS", "INEXACT", "PLAIN", "cannot"]

PLAIN, OURS, CAPTURED = "plain loop", "ours", "captured"
LEARN2LEARN, HIGHER, TORCHOPT, METALEARN, JAX = "learn2learn", "higher", "TorchOpt", "parallel-metalearn", "JAX jit"

#: Whose meta-gradient may differ: an interior point method in float32 that ends after 15 steps.
INEXACT = {(LEARN2LEARN, "svm")}


def ours(workload: Workload, *, capture: str) -> Step:
    """An outer step as a run takes it: metrics, the norm of the meta-gradient and the check that it is finite included.

    The first step includes what a run does before its own: `prepare`. So is the allocator as it is in a run.
    """
    machine.tune()
    return outer_step(*meta_layer(workload), capture=capture)


def outer_step(layer: MetaLayer, episode: Episode, *, capture: str) -> Step:
    """`OuterLoop.step` on one meta-batch."""
    optimizer = adam(layer)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    outer = OuterLoop(layer, optimizer, constant, clip=None, capture=capture)
    unprepared, learned = [episode], list(layer.parameters())

    def step() -> list[Any]:
        if unprepared:
            outer.prepare(unprepared.pop())
        outer.step(episode)
        return gradients(learned)

    return step


def meta_layer(workload: Workload) -> tuple[MetaLayer, Episode]:
    """The algorithm, and the meta-batch; of heads only the features are learned."""
    # What is learned is made in float32, as a run makes it.
    task, base_layer, _ = workload._replace(double=False).make()
    layer = algorithm(workload, task, base_layer)
    layer = layer.to(workload.device)
    return layer.double() if workload.double else layer, workload.make()[2]


def algorithm(workload: Workload, task: TaskDistribution, base_layer: BaseLayer) -> MetaLayer:
    if workload.head is None:
        rule = functools.partial(SGD, lr=INNER_LR)
        gradient = FirstOrder() if workload.first_order else Exact()
        return MAML(base_layer, task, update=rule, meta_gradient=gradient, inner_steps=workload.inner_steps)
    make = {
        "prototypes": Prototypes,
        "ridge": functools.partial(Ridge, kernel=LinearKernel(1.0), reg=REG, scale=SCALE, learn=()),
        "svm": functools.partial(CrammerSingerSVM, kernel=LinearKernel(), c=C, reg=1.0, scale=1.0, learn=()),
    }[workload.head]
    return make(base_layer, task, batch_norm="transductive")


def by_hand(workload: Workload) -> Step:
    if workload.head is not None:
        return plain_head(workload, workload.head)
    return plain_loop(workload, first_order=workload.first_order)


def by_learn2learn(workload: Workload) -> Step:
    return with_learn2learn(workload) if workload.head is None else learn2learn_head(workload, workload.head)


def by_jax(workload: Workload) -> Step:
    return importlib.import_module("with_jax").with_jax(workload)  # only here, since it may not be installed


def with_metalearn(workload: Workload) -> Step:
    """`metalearn.algorithms.MAML`, which vmaps `torch.func.grad`, with its own batch norm, as it asks for.

    PARALLEL_METALEARN names the folder of its unpacked wheel where it is not installed.
    """
    sys.path[:0] = filter(None, [os.environ.get("PARALLEL_METALEARN")])
    from metalearn import algorithms
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss
    from metalearn.model_wrappers.MAMLWrapper import MAML_Model
    from metalearn.nn_models.basic_layers.BatchNormalization import BatchNorm

    task, base_layer, episode = workload.make()
    loss_of = task_loss(task)

    class Part(nn.Module):
        """A module that is told, and does not ask, which step it is."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Any, **_: Any) -> Any:
            return self.module(x)

    class Loss(BaseLoss):
        def forward(self, out_dict: Any, targets: Any, **_: Any) -> Any:
            loss = loss_of(out_dict["logits"], targets)
            return loss, loss.detach()

    model = MAML_Model(Part(in_torch(base_layer, BatchNorm)), Part(nn.Identity()))
    inner = InnerSGD(
        model.get_fast_weights(),
        first_order=workload.first_order,
        inner_lr=INNER_LR,
        max_inner_steps=workload.inner_steps,
        learn_lr=False,
    )
    algorithm = algorithms.MAML(
        model=model,
        optimizer=adam(model),
        inner_optimizer=inner,
        support_loss_fn=Loss(),
        inner_steps=workload.inner_steps,
        chunk_size=workload.tasks,
        device=torch.device(workload.device),
    )
    (sx, sy, _), (qx, qy, _) = episode
    episodes, learned = itertools.repeat((sx, sy, qx, qy)), list(model.parameters())

    def step() -> list[Any]:
        algorithm.step(episodes)
        return gradients(learned)

    return step


CONTENDERS: Mapping[str, Callable[[Workload], Step]] = {
    PLAIN: by_hand,
    OURS: functools.partial(ours, capture="false"),
    CAPTURED: functools.partial(ours, capture="true"),
    LEARN2LEARN: by_learn2learn,
    HIGHER: with_higher,
    TORCHOPT: with_torchopt,
    METALEARN: with_metalearn,
    JAX: by_jax,
}

#: Who has which heads, beside ours.
HEADS = {PLAIN: ("prototypes", "ridge", "svm"), LEARN2LEARN: ("prototypes", "svm"), JAX: ("prototypes", "ridge")}


def cannot(name: str, workload: Workload) -> str | None:
    """Why a contender is not asked; None: it is."""
    if workload.head is not None and name not in (OURS, CAPTURED):
        return None if workload.head in HEADS.get(name, ()) else f"not written for {workload.head}"
    return "knows no first order" if workload.first_order and name == TORCHOPT else None
