"""Contenders that go through the tasks one after another: by hand, learn2learn, higher and TorchOpt.

They learn the same networks, written in torch's own layers, as their users have them.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from steps import INNER_LR, Step, adam, gradients, task_loss
from torch import Tensor, nn
from workloads import Head, Workload

from mlframework.base_layers.normalisation import BatchStatistics
from mlframework.solvers.support_vectors import crammer_singer

__all__ = [
    "REG",
    "SCALE",
    "C",
    "in_torch",
    "learn2learn_head",
    "plain_head",
    "plain_loop",
    "with_higher",
    "with_learn2learn",
    "with_torchopt",
]

#: Of the ridge regression: its regulariser (the square of an offset's feature is 1), and what multiplies its outputs.
REG, SCALE = 1.0, 10.0
#: Of the support vector machine, as in MetaOptNet.
C = 0.1

Loss = Callable[[Tensor, Tensor], Tensor]
#: The query loss of one task, of the network, the loss, support x and y, query x and y.
QueryLoss = Callable[[nn.Module, Loss, Tensor, Tensor, Tensor, Tensor], Tensor]


def in_torch(module: nn.Module, norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """`module`, with a batch norm of torch's in the place of ours; the parameters are the same."""
    for name, child in module.named_children():
        if isinstance(child, BatchStatistics):
            new = norm(len(child.weight), eps=child.eps, track_running_stats=False)
        else:
            in_torch(child, norm)
            continue
        new.to(child.weight).load_state_dict(child.state_dict())
        setattr(module, name, new)
    return module


def loop(workload: Workload, query_loss: QueryLoss, wrap: Callable[[Any], nn.Module] = lambda network: network) -> Step:
    """A step that adds up the tasks' gradients.

    Args:
        workload: what is learned.
        query_loss: of one task.
        wrap: what is made of the network; it shares the parameters.
    """
    task, base_layer, episode = workload.make()
    loss_of, module = task_loss(task), wrap(in_torch(base_layer))
    optimizer, learned = adam(module), list(module.parameters())
    (sx, sy, _), (qx, qy, _) = episode

    def step() -> list[Any]:
        optimizer.zero_grad()
        for examples in zip(sx, sy, qx, qy, strict=True):
            (query_loss(module, loss_of, *examples) / workload.tasks).backward()
        optimizer.step()
        return gradients(learned)

    return step


def plain_loop(workload: Workload, *, first_order: bool = False) -> Step:
    """What a researcher writes by hand."""

    def query_loss(module: nn.Module, loss_of: Loss, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        params = dict(module.named_parameters())
        for _ in range(workload.inner_steps):
            loss = loss_of(torch.func.functional_call(module, params, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
            params = {name: p - INNER_LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return loss_of(torch.func.functional_call(module, params, (qx,)), qy)

    return loop(workload, query_loss)


def plain_head(workload: Workload, head: Head) -> Step:
    """The same with a head that is fitted to features."""
    logits_of = {"prototypes": prototypes, "ridge": ridge, "svm": support_vectors}[head]

    def query_loss(module: nn.Module, loss_of: Loss, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        return loss_of(logits_of(module(sx), F.one_hot(sy).to(sx.dtype), module(qx)), qy)

    return loop(workload, query_loss, lambda network: network.features)


def prototypes(support: Tensor, classes: Tensor, query: Tensor) -> Tensor:
    """Minus squared distances to the classes' means, of features `[n, d]` and one-hot classes `[n, k]`."""
    means = (classes.T @ support) / classes.sum(0).unsqueeze(-1)
    return -(query.unsqueeze(1) - means).square().sum(-1)


def ridge(support: Tensor, classes: Tensor, query: Tensor) -> Tensor:
    """What a ridge regression on one-hot classes predicts, scaled; arguments as above."""
    kernel = support @ support.T + 1 + REG * torch.eye(len(support), device=support.device)
    return SCALE * (query @ support.T + 1) @ torch.linalg.solve(kernel, classes)


def support_vectors(support: Tensor, classes: Tensor, query: Tensor) -> Tensor:
    """What MetaOptNet's machine predicts, by our solver, one task at a time; arguments as above."""
    kernel = support @ support.T
    return query @ support.T @ crammer_singer(kernel.unsqueeze(0), classes.unsqueeze(0), c=C).dual[0]


def unpacked_learn2learn() -> None:
    """Makes the algorithms of the source distribution that LEARN2LEARN names importable, without what is not built."""
    folder = Path(os.environ.get("LEARN2LEARN", "learn2learn-0.2.0")) / "learn2learn"
    if not (folder / "algorithms" / "maml.py").exists():
        raise ModuleNotFoundError("No module named 'learn2learn'; see --help")
    for name in ("learn2learn", "learn2learn.algorithms", "learn2learn.nn"):  # their __init__ import gym, torchvision
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package


def with_learn2learn(workload: Workload) -> Step:
    """`learn2learn.algorithms.MAML`."""
    unpacked_learn2learn()
    from learn2learn.algorithms import maml

    def query_loss(module: nn.Module, loss_of: Loss, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        learner = module.clone()  # type: ignore[operator]
        for _ in range(workload.inner_steps):
            learner.adapt(loss_of(learner(sx), sy))
        return loss_of(learner(qx), qy)

    wrap = functools.partial(maml.MAML, lr=INNER_LR, first_order=workload.first_order)
    return loop(workload, query_loss, wrap)


def learn2learn_head(workload: Workload, head: Head) -> Step:
    """`learn2learn.nn.PrototypicalClassifier` or `SVClassifier`, used as their docstrings say."""
    unpacked_learn2learn()
    if head == "svm":
        import qpth  # noqa: F401 - which learn2learn would miss only when it solves
        from learn2learn.nn.metaoptnet import SVClassifier as Classifier
    else:
        from learn2learn.nn.protonet import PrototypicalClassifier as Classifier

    def query_loss(module: nn.Module, loss_of: Loss, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        classifier = Classifier()
        classifier.fit_(module(sx), sy)
        return loss_of(classifier(module(qx)), qy)

    return loop(workload, query_loss, lambda network: network.features)


def with_higher(workload: Workload) -> Step:
    """`higher.innerloop_ctx`; in first order it is told to detach the gradients, whose graph it makes all the same."""
    import higher

    def constant(grads: list[Tensor]) -> list[Tensor]:
        return [grad.detach() for grad in grads]

    callback = constant if workload.first_order else None

    def query_loss(module: nn.Module, loss_of: Loss, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        inner = torch.optim.SGD(module.parameters(), lr=INNER_LR)
        with higher.innerloop_ctx(module, inner, copy_initial_weights=False) as (model, optimizer):
            for _ in range(workload.inner_steps):
                optimizer.step(loss_of(model(sx), sy), grad_callback=callback)
            return loss_of(model(qx), qy)

    return loop(workload, query_loss)


def with_torchopt(workload: Workload) -> Step:
    """`torchopt.MetaSGD`, with the state taken and put back around each task."""
    import torchopt

    def query_loss(module: nn.Module, loss_of: Loss, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        inner = torchopt.MetaSGD(module, lr=INNER_LR)
        start = torchopt.extract_state_dict(module, by="reference")
        for _ in range(workload.inner_steps):
            inner.step(loss_of(module(sx), sy))
        loss = loss_of(module(qx), qy)
        torchopt.recover_state_dict(module, start)
        return loss

    return loop(workload, query_loss)
