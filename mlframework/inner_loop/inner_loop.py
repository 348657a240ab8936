"""The inner loop: gradient steps on the support loss, from stacked parameters to stacked parameters."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlframework.backend.forward import region
from mlframework.episode import Params
from mlframework.inner_loop.inner_update import InnerUpdate

__all__ = ["differentiable", "ends", "inner_loop", "last"]

T = TypeVar("T")

log = logging.getLogger(__name__)


def inner_loop(
    losses_of: Callable[..., Tensor],
    params: Params,
    update: InnerUpdate,
    steps: int,
    *,
    data: Callable[[int], tuple[Any, ...]] = lambda step: (),
    parts: Callable[..., Iterable[tuple[Tensor, tuple[Any, ...]]]] | None = None,
    detached_steps: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    checkpoint_steps: bool = False,
    idle: set[str] | None = None,
) -> Iterator[Params]:
    """Yields the stacked parameters after 0, 1, ..., `steps` gradient steps.

    Args:
        losses_of: the support loss of each task `[tasks]`, given stacked parameters, the step, and its data. It must
            depend on nothing else but parameters and buffers: a step is a `region`.
        params: `[tasks, *shape]` each.
        data: of each step: tensors, or nests of them.
        parts: divides a step's data into parts, each with its share of every task's loss `[tasks]`; the gradient is
            summed over them, part by part, in the memory of one. None: all data at once.
        detached_steps: how many of the first steps' gradients are constants, as a first-order meta-gradient takes them;
            the others can be differentiated again. Under `torch.no_grad` all are constants.
        weight_decay: share of its parameter that is added to every gradient, after clipping, as in `torch.optim.SGD`.
        clip: the largest norm of a task's whole gradient; longer ones are scaled down to it. None leaves them.
        checkpoint_steps: whether to keep only each step's parameters and compute the rest anew in the backward pass:
            memory for one step instead of `steps`, for about a third more time.
        idle: parameters that the support loss is known not to depend on. New ones are logged once, and added.
    """
    taken = Step(losses_of, update, weight_decay, clip, set() if idle is None else idle, parts).take
    step = region(taken) if parts is None else taken
    state = update.init(params)
    yield params
    for index in range(steps):
        args = (params, state, data(index), index < detached_steps, index)
        if checkpoint_steps and torch.is_grad_enabled():
            params, state = checkpoint(step, *args, use_reentrant=False)
        else:
            params, state = step(*args)
        yield params


@dataclass(frozen=True)
class Step:
    """A gradient step; see `inner_loop` for the attributes."""

    losses_of: Callable[..., Tensor]
    update: InnerUpdate
    weight_decay: float
    clip: float | None
    idle: set[str]
    parts: Callable[..., Iterable[tuple[Tensor, tuple[Any, ...]]]] | None = None

    def take(self, params: Params, state: Any, data: tuple[Any, ...], constant: bool, index: int) -> tuple[Params, Any]:
        """The moved parameters and the rule's next state; `constant`: whether the gradient is one.

        Tasks are independent, so the gradient of the summed loss by the stacked parameters is every task's own
        gradient. It is taken here, outside any vmap, and is exact to every order.
        """
        exact = torch.is_grad_enabled() and not constant
        params = {name: differentiable(p) for name, p in params.items()}
        with torch.enable_grad():
            grads = self.gradients(params, data, exact, index)
        # A parameter that the loss does not depend on stays where it is.
        if len(grads) < len(params):
            report_idle(params.keys() - grads.keys(), self.idle)
        moving = {name: params[name] for name in grads}
        if self.clip is not None:
            grads = clipped(grads, self.clip)
        if self.weight_decay:
            # A first-order meta-gradient takes the decay for a constant, as the rest of the gradient.
            held = moving if exact else {name: p.detach() for name, p in moving.items()}
            grads = {name: grad + self.weight_decay * held[name] for name, grad in grads.items()}
        moved, state = self.update(moving, grads, state, index)
        return {**params, **moved}, state

    def gradients(self, params: Params, data: tuple[Any, ...], exact: bool, index: int) -> Params:
        """Each task's gradient of its loss on a step's data; `exact`: whether it can be differentiated again."""
        if self.parts is None:
            return gradients(self.losses_of(params, index, *data), params, create_graph=exact)
        of_part, total = region(self.of_part), dict[str, Tensor]()
        for share, part in self.parts(*data):
            args = (params, share, part, exact, index)
            found = checkpoint(of_part, *args, use_reentrant=False) if exact else of_part(*args)
            total = {name: total[name] + grad if total else grad for name, grad in found.items()}
        return total

    def of_part(self, params: Params, share: Tensor, part: tuple[Any, ...], exact: bool, index: int) -> Params:
        """A part's share of each task's gradient."""
        losses = self.losses_of(params, index, *part)
        return gradients(losses * share.to(losses.dtype), params, create_graph=exact)


def differentiable(p: Tensor) -> Tensor:
    """A parameter by which the support loss can be differentiated.

    Without a meta-gradient to take, every step starts anew: a view of a parameter made under `no_grad` would pretend
    to require a gradient and get none.
    """
    return p if torch.is_grad_enabled() and p.requires_grad else p.detach().requires_grad_()


def last(values: Iterable[T]) -> T:
    """The last of at least one value. Each is freed before the one after the next is made: `*_, x` would hold all.

    >>> last(range(3))
    2
    """
    (value,) = deque(values, maxlen=1)
    return value


def ends(values: Iterable[T]) -> list[T]:
    """The first and the last value, or the only one; the others are freed, as in `last`.

    >>> ends(range(3)), ends(range(1))
    ([0, 2], [0])
    """
    iterator = iter(values)
    return [next(iterator), *deque(iterator, maxlen=1)]


def gradients(losses: Tensor, params: Params, *, create_graph: bool) -> Params:
    """Each task's gradient of its loss `[tasks]`, without the parameters that the losses do not depend on."""
    inputs, ones = list(params.values()), torch.ones_like(losses)
    found = torch.autograd.grad(losses, inputs, ones, create_graph=create_graph, allow_unused=True)
    return {name: grad for name, grad in zip(params, found, strict=True) if grad is not None}


def clipped(grads: Params, limit: float) -> Params:
    """Gradients whose norm over all parameters, for each task, is at most `limit`; where it is below, they stay."""
    total = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0)
    # The root of a clamped square, so that a gradient of zero has a finite derivative.
    scale = limit / total.clamp(min=limit**2).sqrt()  # [tasks]
    return {name: grad * scale.view(-1, *(1 for _ in grad.shape[1:])) for name, grad in grads.items()}


def report_idle(names: set[str], known: set[str]) -> None:
    """Logs, in one line, the names that are not known yet, and adds them."""
    if names - known:
        log.warning("the support loss does not depend on %s: not adapted", ", ".join(sorted(names - known)))
        known |= names
