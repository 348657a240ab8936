"""An outer step as one compiled graph: losses, metrics and meta-gradients without python in between.

The meta-gradient of a meta-batch is traced once for each shape of episode (`make_fx`) and compiled by inductor, as in
`torch.compile`, which cannot trace a gradient within a gradient. Before a graph is used, what it gives for the episode
at hand is compared with the ordinary, eager way; one that cannot be traced or compiled, or that differs, is given up
for this run, and one line says why.
"""

from __future__ import annotations

import logging
import os
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue, nearest
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.tasks.data_folder import cache_folder

__all__ = ["CHOICES", "Capture", "eager_gradients"]

CHOICES = ("auto", "true", "false")

#: Relative difference of a whole meta-gradient from the eager one that rounding can explain.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}

#: Seconds that tracing and compiling are expected to take where nothing is cached, and what they make of a step.
EXPECTED_SECONDS, EXPECTED_SPEEDUP = 60.0, 2.0

#: Eager steps by whose median `auto` decides.
TIMED_STEPS = 5

#: Shapes of episodes for which graphs are kept; others take their steps eagerly.
MOST_SHAPES = 8

log = logging.getLogger(__name__)


class Gradients(NamedTuple):
    """The meta-gradient of an episode.

    Attributes:
        losses: the meta-loss of each task `[tasks]`.
        metrics: what is reported, `[tasks]` each.
        by_name: for each meta-parameter that took part, the gradient of the *sum* of the losses.
    """

    losses: Tensor
    metrics: Metrics
    by_name: dict[str, Tensor]


class NotCapturable(Exception):
    """Why a step cannot be a graph."""


def eager_gradients(meta_layer: MetaLayer, episode: Episode) -> Gradients:
    """The meta-gradient as autograd finds it; no `.grad` is touched."""
    learned = {name: p for name, p in meta_layer.named_parameters() if p.requires_grad}
    losses, metrics = meta_layer.meta_loss(episode)
    found = torch.autograd.grad(losses.sum(), list(learned.values()), allow_unused=True)
    by_name = {name: grad for name, grad in zip(learned, found, strict=True) if grad is not None}
    return Gradients(losses.detach(), {name: value.detach() for name, value in metrics.items()}, by_name)


class Capture:
    """Takes meta-gradients from compiled graphs where that pays, else eagerly.

    Args:
        meta_layer: the algorithm, in training mode.
        wanted: `true`: at the first episode of each shape; `false`: never; `auto`: once `steps_left` is known and large
            enough that the time saved is expected to exceed that of compiling.
    """

    def __init__(self, meta_layer: MetaLayer, wanted: str) -> None:
        if wanted not in CHOICES:
            raise InvalidValue("capture", wanted, f"must be one of {', '.join(CHOICES)}{nearest(wanted, CHOICES)}")
        self.meta_layer, self.wanted = meta_layer, wanted
        self.steps_left = 0
        self.graphs: dict[Any, Graph | None] = {}
        self.times: dict[Any, list[float]] = {}

    def __call__(self, episode: Episode) -> Gradients:
        """The meta-gradient of an episode."""
        if self.wanted == "false":
            return eager_gradients(self.meta_layer, episode)
        key = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves(episode))
        if key not in self.graphs and self.pays(key):
            self.graphs[key] = self.captured(episode, len(self.graphs))
        graph = self.graphs.get(key)
        if graph is not None:
            return graph(self.meta_layer, episode)
        began = time.perf_counter()
        found = eager_gradients(self.meta_layer, episode)
        if key not in self.graphs and len(times := self.times.setdefault(key, [])) <= TIMED_STEPS:
            times.append(time.perf_counter() - began)
        return found

    def pays(self, key: Any) -> bool:
        """Whether a graph for a shape is worth its compilation, as far as can be known before."""
        if self.wanted == "true":
            return True
        times = self.times.get(key, [])
        if len(times) <= TIMED_STEPS:
            return False
        saved = statistics.median(times[1:]) * (1 - 1 / EXPECTED_SPEEDUP)  # the first one warms up
        return self.steps_left * saved > EXPECTED_SECONDS

    def captured(self, episode: Episode, kept: int) -> Graph | None:
        """A graph that was seen to give what the eager step gives, or None and a line that says why not."""
        if kept >= MOST_SHAPES:
            log.warning("capture: an episode of yet another shape; graphs of %d shapes are kept: eager", kept)
            return None
        try:
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own making
                graph = Graph(self.meta_layer, episode)
                graph(self.meta_layer, episode)
            compiling = time.perf_counter() - began
            eager_seconds, eager = timed(lambda: eager_gradients(self.meta_layer, episode))
            seconds, found = timed(lambda: graph(self.meta_layer, episode))
            check_same(found, eager)
        except Exception as error:  # tracing and compiling fail with many kinds; the eager step is there for all
            why = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...") or type(error).__name__
            log.warning("capture: eager steps instead: %s", why)
            return None
        pays = f"pays after {compiling / (eager_seconds - seconds):.0f} steps" if seconds < eager_seconds else "no gain"
        speed = f"{eager_seconds * 1e3:.3g} -> {seconds * 1e3:.3g} ms for a meta-gradient"
        log.info("capture: compiled in %.1f s; %s (%s)", compiling, speed, pays)
        return graph if seconds < eager_seconds or self.wanted == "true" else None


class Graph:
    """A compiled meta-gradient, for episodes of one shape.

    Args:
        meta_layer: the algorithm; its parameters and buffers are inputs of the graph, not part of it.
        episode: the first of its shape.

    Raises:
        NotCapturable: the step draws random numbers, or changes with the number of the outer step.
        Exception: whatever tracing and compiling raise.
    """

    def __init__(self, meta_layer: MetaLayer, episode: Episode) -> None:
        # What is compiled is kept; inductor reads the place once, and it is the user's if they named one.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        from torch._inductor import compile as compile_graph
        from torch.fx.experimental.proxy_tensor import make_fx

        self.names: list[str] = []
        self.metrics: list[str] = []
        inputs = self.inputs(meta_layer, episode)
        before, meta_layer.outer_step = meta_layer.outer_step, Watched(meta_layer.outer_step)
        try:
            traced = make_fx(self.flat_step(meta_layer), tracing_mode="fake")(*inputs)
            touched = meta_layer.outer_step.touched
        finally:
            meta_layer.outer_step = before
        if touched:
            raise NotCapturable(f"{type(meta_layer).__name__} changes with the number of the outer step")
        for node in traced.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NotCapturable(f"{type(meta_layer).__name__} draws random numbers ({node.target})")
        options = {"cpp_wrapper": True} if episode.device.type == "cpu" else {}
        self.compiled: Callable[..., Sequence[Tensor]] = compile_graph(traced, inputs, options=options)

    def __call__(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        with torch.no_grad():
            losses, *found = self.compiled(*self.inputs(meta_layer, episode))
        metrics = dict(zip(self.metrics, found, strict=False))
        return Gradients(losses, metrics, dict(zip(self.names, found[len(metrics) :], strict=True)))

    @staticmethod
    def inputs(meta_layer: nn.Module, episode: Episode) -> list[Any]:
        return [tensor.detach() for tensor in (*state(meta_layer).values(), *leaves(episode))]

    def flat_step(self, meta_layer: MetaLayer) -> Callable[..., list[Tensor]]:
        """A function of tensors to tensors: losses, metrics, gradients; notes what the latter are called."""
        names = list(state(meta_layer))
        learned = {name for name, p in meta_layer.named_parameters() if p.requires_grad}

        def step(*inputs: Tensor) -> list[Tensor]:
            held, data = inputs[: len(names)], inputs[len(names) :]
            tensors = {name: t.detach().requires_grad_(name in learned) for name, t in zip(names, held, strict=True)}
            episode = Episode(Examples(*data[:3]), Examples(*data[3:]))
            with torch.nn.utils.stateless._reparametrize_module(meta_layer, tensors):
                losses, metrics = meta_layer.meta_loss(episode)
            wanted = [name for name in names if name in learned]
            found = torch.autograd.grad(losses.sum(), [tensors[name] for name in wanted], allow_unused=True)
            grads = {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}
            self.names[:], self.metrics[:] = grads, metrics
            return [losses.detach(), *(value.detach() for value in metrics.values()), *grads.values()]

        return step


class Watched(int):
    """A number that knows whether anybody has computed or compared with it."""

    touched = False


def watch(name: str) -> Callable[..., Any]:
    def method(self: Watched, *args: Any) -> Any:
        self.touched = True
        return getattr(int, name)(self, *args)

    return method


for operation in ("lt", "le", "gt", "ge", "eq", "ne", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv"):
    setattr(Watched, f"__{operation}__", watch(f"__{operation}__"))
for operation in ("rtruediv", "floordiv", "mod", "pow", "rpow", "bool", "int", "float", "index", "hash", "neg"):
    setattr(Watched, f"__{operation}__", watch(f"__{operation}__"))


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def leaves(episode: Episode) -> list[Tensor]:
    return [*episode.support, *episode.query]


def timed(function: Callable[[], Gradients]) -> tuple[float, Gradients]:
    """The shorter of two runs, in seconds, and what came of the last."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = function()
        seconds.append(time.perf_counter() - began)
    return min(seconds), found


def check_same(found: Gradients, eager: Gradients) -> None:
    """Raises `NotCapturable` where the whole meta-gradient or the losses are not those of the eager step.

    The whole, because some parameters' gradients are zero but for rounding, as a bias before a batch norm.
    """
    if found.by_name.keys() != eager.by_name.keys():
        raise NotCapturable("the graph has gradients for other parameters than the eager step")

    def whole(gradients: Gradients) -> Tensor:
        return torch.cat([gradients.losses, *(grad.flatten() for grad in gradients.by_name.values())])

    truth = whole(eager)
    difference = ((whole(found) - truth).norm() / truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)).item()
    if not difference <= TOLERANCES.get(truth.dtype, 1e-2):
        raise NotCapturable(f"the graph's meta-gradient is {difference:.1e} off the eager one")
