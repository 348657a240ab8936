"""Parts of an outer step as compiled graphs: the whole meta-gradient, or a function that a step calls again and again.

`make_fx` and `aot_function` trace through the gradients that an inner loop takes, which `torch.compile` does not, and
inductor compiles what they find. Parameters and buffers of the meta layer are inputs of a graph, not part of it.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mlframework.episode import Episode, Examples
from mlframework.files import cache_folder
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics

__all__ = ["Gradients", "NotCapturable", "Units", "WholeStep", "eager_gradients"]

#: Stands for a tensor among the arguments of a function.
TENSOR = object()


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


class WholeStep:
    """The meta-gradient of a meta layer as one graph, for episodes of one shape.

    Args:
        meta_layer: the algorithm, in training mode.
        episode: the first of its shape.

    Raises:
        NotCapturable: the step draws random numbers, or changes with the number of the outer step.
        Exception: whatever tracing and compiling raise.
    """

    def __init__(self, meta_layer: MetaLayer, episode: Episode) -> None:
        keep_what_is_compiled()
        from torch._inductor.compile_fx import compile_fx
        from torch.fx.experimental.proxy_tensor import make_fx

        self.names: list[str] = []
        self.metrics: list[str] = []
        #: Parameters and buffers; finding them takes longer than a small step.
        self.held = list(tensors_of(meta_layer).values())
        inputs = self.inputs(episode)
        with tracing(meta_layer):
            traced = make_fx(self.flat_step(meta_layer), tracing_mode="fake")(*inputs)
            reject_random_numbers(traced, meta_layer)
            self.compiled: Callable[..., Any] = compile_fx(traced, inputs, config_patches=inductor_settings(meta_layer))  # type: ignore[assignment]

    def __call__(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        with torch.no_grad():
            losses, *found = self.compiled(*self.inputs(episode))
        metrics = dict(zip(self.metrics, found, strict=False))
        return Gradients(losses, metrics, dict(zip(self.names, found[len(metrics) :], strict=True)))

    def inputs(self, episode: Episode) -> list[Any]:
        return [tensor.detach() for tensor in (*self.held, *episode.support, *episode.query)]

    def flat_step(self, meta_layer: MetaLayer) -> Callable[..., list[Tensor]]:
        """A function of tensors to tensors: losses, metrics, gradients; notes what the latter are called."""
        names = list(tensors_of(meta_layer))
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


class Units:
    """Compiles the functions that an algorithm calls through `run`, each with its backward pass, once for each shape.

    What a step repeats, as the steps of an inner loop, is then compiled once, however often it is repeated. It is
    called as a `Run`.

    Args:
        meta_layer: whose parameters and buffers the functions may use, beside their arguments.
    """

    def __init__(self, meta_layer: MetaLayer) -> None:
        self.meta_layer = meta_layer
        self.units: dict[Any, Unit] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        flat, structure = tree_flatten(args)
        # One way to lie in memory: parameters start as views that all tasks share.
        tensors = [leaf.contiguous() for leaf in flat if isinstance(leaf, Tensor)]
        numbers = tuple(leaf for leaf in flat if type(leaf) is int)
        others = tuple(leaf for leaf in flat if not isinstance(leaf, Tensor) and type(leaf) is not int)
        shapes = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
        key = (function.__qualname__, structure, shapes, others, torch.is_grad_enabled())
        # A number like that of an inner step often makes no difference: one unit is then there for all.
        unit = self.units.get((key, None)) or self.units.get((key, numbers))
        if unit is None:
            unit = Unit(self.meta_layer, function, flat, structure)
            result = unit(tensors)
            self.units[key, numbers if unit.depends_on_numbers else None] = unit
            return result
        return unit(tensors)


class Unit:
    """A compiled function of nests of tensors, with its backward pass, for arguments of one shape.

    Args:
        meta_layer, function: see `Units`.
        flat: the arguments, flattened.
        structure: how they were nested.
    """

    def __init__(
        self, meta_layer: MetaLayer, function: Callable[..., Any], flat: Sequence[Any], structure: TreeSpec
    ) -> None:
        keep_what_is_compiled()
        from functorch.compile import aot_function, min_cut_rematerialization_partition
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table

        self.meta_layer, self.held = meta_layer, list(tensors_of(meta_layer).values())
        self.results: TreeSpec | None = None
        others = [TENSOR if isinstance(leaf, Tensor) else watched(leaf) for leaf in flat]
        self.numbers = [leaf for leaf in others if isinstance(leaf, Watched)]
        names = list(tensors_of(meta_layer))

        def flattened(*inputs: Tensor) -> list[Tensor]:
            tensors = iter(inputs[len(names) :])
            args = tree_unflatten([next(tensors) if leaf is TENSOR else leaf for leaf in others], structure)
            held = dict(zip(names, inputs, strict=False))
            with torch.nn.utils.stateless._reparametrize_module(meta_layer, held):
                leaves, self.results = tree_flatten(function(*args))
            return leaves

        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            reject_random_numbers(graph, meta_layer)
            settings = inductor_settings(meta_layer)
            with torch._inductor.config.patch(settings):
                return compile_fx_inner(graph, inputs, cpp_wrapper=settings.get("cpp_wrapper", False))

        self.compiled = aot_function(
            flattened,
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        inputs = (*self.held, *tensors)
        if self.results is None:
            # Its own gradient may be taken twice over, so what the forward pass leaves must stay.
            with tracing(self.meta_layer), torch._functorch.config.patch(donated_buffer=False):
                leaves = self.compiled(*inputs)
        else:
            leaves = self.compiled(*inputs)
        assert self.results is not None
        return tree_unflatten(leaves, self.results)

    @property
    def depends_on_numbers(self) -> bool:
        """Whether anybody computed with a number among the arguments while the function was traced."""
        return any(number.touched for number in self.numbers)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def keep_what_is_compiled() -> None:
    """Names the folder of what inductor compiles, unless the user has; it reads the name when it is imported."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def inductor_settings(meta_layer: MetaLayer) -> dict[str, Any]:
    """What differs from inductor's defaults, for the device of the meta layer."""
    if next(meta_layer.parameters()).device.type != "cpu":
        return {}
    settings: dict[str, Any] = {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        # inductor writes vectors itself, and turns the compiler's own vectorising off, on which its masks depend: they
        # are ten times slower without. The flag is handed over where it comes after the one that turns it off.
        settings["cpp.march"] = "native -ftree-loop-vectorize"
    return settings


@contextmanager
def tracing(meta_layer: MetaLayer) -> Iterator[None]:
    """Refuses to trace what changes with the number of the outer step."""
    before, meta_layer.outer_step = meta_layer.outer_step, Watched(meta_layer.outer_step)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            yield
        if meta_layer.outer_step.touched:
            raise NotCapturable(f"{type(meta_layer).__name__} changes with the number of the outer step")
    finally:
        meta_layer.outer_step = before


def reject_random_numbers(graph: torch.fx.GraphModule, meta_layer: MetaLayer) -> None:
    """Raises `NotCapturable` if a graph draws random numbers."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotCapturable(f"{type(meta_layer).__name__} draws random numbers ({node.target})")


class Watched(int):
    """A number that knows whether anybody has computed or compared with it."""

    touched = False


def watched(value: Any) -> Any:
    """A whole number to be watched; anything else as it is."""
    return Watched(value) if type(value) is int else value


def watch(name: str) -> Callable[..., Any]:
    def method(self: Watched, *args: Any) -> Any:
        self.touched = True
        return getattr(int, name)(self, *args)

    return method


for operation in ("lt", "le", "gt", "ge", "eq", "ne", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv"):
    setattr(Watched, f"__{operation}__", watch(f"__{operation}__"))
for operation in ("rtruediv", "floordiv", "mod", "pow", "rpow", "bool", "int", "float", "index", "hash", "neg"):
    setattr(Watched, f"__{operation}__", watch(f"__{operation}__"))
