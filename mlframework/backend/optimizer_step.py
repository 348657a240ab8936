"""A step of the optimizer, with little Python around its kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from mlframework.backend.private import fused_adam, increment, optimizer_has_hooks

__all__ = ["optimizer_step"]


def optimizer_step(optimizer: Optimizer) -> None:
    """Does what `optimizer.step()` does.

    A step of fused Adam on a small network is mostly Python: an eighth of a captured outer step. So, where it is plain
    and nobody hooked into it, its kernel is called here from the second step on.
    """
    if not may_be_called_directly(optimizer):
        optimizer.step()
        return
    for group in optimizer.param_groups:
        call_kernel(group, optimizer.state)


def may_be_called_directly(optimizer: Optimizer) -> bool:
    """Whether it is torch's fused Adam or AdamW, untouched, of parameters of one kind that have been stepped before."""
    if type(optimizer) not in (Adam, AdamW) or getattr(optimizer, "grad_scale", None) is not None:
        return False
    if optimizer_has_hooks(optimizer):
        return False
    # A scheduler wraps it, to know that there was a first step; anybody else's is to be called.
    own, step = type(optimizer).step, vars(optimizer).get("step")
    if step is not None and getattr(step, "__wrapped__", None) is not own:
        return False
    learned = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if len({(p.device, p.dtype) for p in learned}) != 1 or not all(map(optimizer.state.__contains__, learned)):
        return False
    return all(map(is_plain, optimizer.param_groups))


def is_plain(group: Mapping[str, Any]) -> bool:
    variants = group["amsgrad"] or group["capturable"] or group["differentiable"]
    plain = type(group["lr"]) is float and type(group["betas"][0]) is float
    return bool(group["fused"]) and plain and not variants and "decoupled_weight_decay" in group  # not in older torch


@torch.no_grad()
def call_kernel(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """The step of one group of parameters, in place."""
    learned = [p for p in group["params"] if p.grad is not None]
    if not learned:
        return
    states = [state[p] for p in learned]
    counts = [of["step"] for of in states]
    increment(counts)
    beta1, beta2 = group["betas"]
    fused_adam(group["decoupled_weight_decay"])(
        learned,
        [p.grad for p in learned],
        [of["exp_avg"] for of in states],
        [of["exp_avg_sq"] for of in states],
        [],
        counts,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )
