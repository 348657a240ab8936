"""Two ways to run a function of one task over a meta-batch, vectorised and as a loop, and which of them modules allow.

Only the *forward* of a base layer is vectorised; the inner gradient is taken outside, over stacked parameters. Taking
it inside (`vmap(torch.func.grad(loss))`) gives silently wrong second derivatives where a native batch, layer or
instance norm is involved.
"""

from __future__ import annotations

import logging
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from mlframework.backend.algorithm import Algorithm, Engine
from mlframework.backend.machine import fork_rng
from mlframework.backend.private import tree_flatten, tree_unflatten
from mlframework.backend.tracing import is_traced
from mlframework.episode import Episode
from mlframework.errors import InvalidValue, nearest

__all__ = ["choose_engine", "over_tasks"]

CHOICES = ("auto", *get_args(Engine))

log = logging.getLogger(__name__)


def over_tasks(function: Callable[..., Tensor], *args: Any, engine: Engine) -> Tensor:
    """The results `[tasks, ...]` of a function of one task.

    Args:
        function: takes what `args` holds, without the leading axis.
        args: tensors, or nests of them, whose leaves all start with `[tasks]`.
        engine: `vectorised` (`torch.func.vmap`) or `loop`, which takes modules that cannot be vmapped, and is faster
            for a single task: eagerly, that goes by the loop.
    """
    leaves, structure = tree_flatten(args)
    if engine == "vectorised" and (len(leaves[0]) > 1 or is_traced()):
        return torch.func.vmap(function, randomness="different")(*args)
    if len(leaves[0]) == 1:  # views, which copy nothing
        return function(*tree_unflatten([leaf.squeeze(0) for leaf in leaves], structure)).unsqueeze(0)
    # unbind rather than an index per task, whose backward fills a tensor of all tasks for each of them.
    tasks = zip(*(leaf.unbind() for leaf in leaves), strict=True)
    return torch.stack([function(*tree_unflatten(list(task), structure)) for task in tasks])


def choose_engine(meta_layer: Algorithm, episode: Episode, wanted: str) -> Engine:
    """The engine for a meta layer: the one that is wanted, or with `auto` the fastest that its modules allow.

    The meta layer is tried on two tasks, and stays as it is. If `auto` falls back to the loop, a log line says why.

    Raises:
        InvalidValue: no such engine, or `vectorised` is wanted of modules that vmap refuses.
        Exception: whatever the meta layer raises in the loop as well, which is its own mistake.
    """
    if wanted not in CHOICES:
        raise InvalidValue("engine", wanted, f"must be one of {', '.join(CHOICES)}{nearest(wanted, CHOICES)}")
    if wanted == "loop":
        return "loop"
    why = refusal(meta_layer, episode.tasks([0, 1 % episode.num_tasks]))
    if why is None:
        return "vectorised"
    if wanted == "vectorised":
        raise InvalidValue("engine", wanted, f"{why}: use loop or auto")
    log.warning("engine=loop, one task after another: %s", why)
    return "loop"


def refusal(meta_layer: Algorithm, episode: Episode) -> str | None:
    """Which module vmap refuses, and why, in one line; None where it takes them all."""
    try:
        attempt(meta_layer, episode, "vectorised")
    except Exception as error:  # vmap raises all kinds; the loop raises the module's own errors again
        refused = error
    else:
        return None
    attempt(meta_layer, episode, "loop")
    return f"vmap refuses {culprit(meta_layer, refused)} ({textwrap.shorten(str(refused), 100, placeholder=' ...')})"


def attempt(meta_layer: Algorithm, episode: Episode, engine: Engine) -> None:
    """Adapts and predicts once by an engine; the meta layer and the random numbers are afterwards as before."""
    before = meta_layer.engine
    meta_layer.engine = engine
    try:
        with torch.no_grad(), fork_rng(episode.device):
            adapted = meta_layer.adapt(episode.support)
            meta_layer.predict(adapted, episode.query.x, meta_layer.mask_or_none(episode.query.mask))
    finally:
        meta_layer.engine = before


def culprit(meta_layer: Algorithm, error: Exception) -> str:
    """The innermost module that an error came from, as in `features.0 (GRU)`."""
    names = {id(module): name for name, module in meta_layer.base_layer.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [module for module in frames if id(module) in names]
    module = inside[-1] if inside else meta_layer.base_layer
    return " ".join(filter(None, [names[id(module)], f"({type(module).__name__})"]))
