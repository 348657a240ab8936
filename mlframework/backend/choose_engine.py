"""Which engine a meta layer's modules allow."""

from __future__ import annotations

import logging
import textwrap
import traceback
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from mlframework.backend.devices import fork_rng
from mlframework.backend.engine import Engine
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue, nearest

__all__ = ["Adapts", "choose_engine"]

CHOICES = ("auto", *get_args(Engine))

log = logging.getLogger(__name__)


class Adapts(Protocol):
    """A meta layer, as far as an engine is chosen for it."""

    engine: Engine

    @property
    def base_layer(self) -> nn.Module: ...

    def adapt(self, support: Examples) -> Any: ...

    def predict(self, adapted: Any, x: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def mask_or_none(self, mask: Tensor) -> Tensor | None: ...


def choose_engine(meta_layer: Adapts, episode: Episode, wanted: str) -> Engine:
    """The engine for a meta layer: the one that is wanted, or with `auto` the fastest that its modules allow.

    Args:
        meta_layer: is tried, and left as it is; the caller sets its `engine`.
        episode: tasks as it will meet them; two are tried.
        wanted: `auto`, `vectorised` or `loop`. Where `auto` falls back to the loop, one log line says why.

    Raises:
        InvalidValue: no such engine, or `vectorised` is wanted of modules that vmap refuses.
        Exception: whatever the meta layer raises in the loop as well; that is its own mistake, not vmap's.
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


def refusal(meta_layer: Adapts, episode: Episode) -> str | None:
    """Which module vmap refuses, and why, in one line; None where it takes them all."""
    try:
        attempt(meta_layer, episode, "vectorised")
    except Exception as error:  # vmap refuses with many kinds; what is the module's own mistake comes again in the loop
        refused = error
    else:
        return None
    attempt(meta_layer, episode, "loop")
    return f"vmap refuses {culprit(meta_layer, refused)} ({textwrap.shorten(str(refused), 100, placeholder=' ...')})"


def attempt(meta_layer: Adapts, episode: Episode, engine: Engine) -> None:
    """Adapts and predicts once by an engine; the meta layer and the random numbers are afterwards as before."""
    before = meta_layer.engine
    meta_layer.engine = engine
    try:
        with torch.no_grad(), fork_rng(episode.device):
            adapted = meta_layer.adapt(episode.support)
            meta_layer.predict(adapted, episode.query.x, meta_layer.mask_or_none(episode.query.mask))
    finally:
        meta_layer.engine = before


def culprit(meta_layer: Adapts, error: Exception) -> str:
    """The innermost module that an error came from, as in `features.0 (GRU)`."""
    names = {id(module): name for name, module in meta_layer.base_layer.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [module for module in frames if id(module) in names]
    module = inside[-1] if inside else meta_layer.base_layer
    return " ".join(filter(None, [names[id(module)], f"({type(module).__name__})"]))
