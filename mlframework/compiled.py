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
from mlframework.graph_passes import lay_out, memory_order, merge_products
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.operators import TRACED

__all__ = [
    "Conclusion",
    "End",
    "Gradients",
    "NotCapturable",
    "Units",
    "WholeStep",
    "averaged",
    "concluded",
    "eager_gradients",
]

#: Stands for a tensor among the arguments of a function.
TENSOR = object()


class Gradients(NamedTuple):
    """The meta-gradient of an episode.

    Attributes:
        losses: the meta-loss of each task `[tasks]`.
        metrics: what is reported, `[tasks]` each.
        by_name: for each meta-parameter that took part, the gradient of the *sum* of the losses; beside a conclusion,
            what the optimizer steps along.
        conclusion: what follows, where the episode is a whole meta-batch and that has been found as well.
    """

    losses: Tensor
    metrics: Metrics
    by_name: dict[str, Tensor]
    conclusion: Conclusion | None = None


class Conclusion(NamedTuple):
    """What a meta-batch comes to, beside its gradient, before the optimizer moves anything; scalar tensors.

    Attributes:
        norm: of the whole meta-gradient, before clipping.
        total: of losses and norm: finite if all of them are.
        means: of the metrics over tasks.
    """

    norm: Tensor
    total: Tensor
    means: Metrics


#: What follows from the gradients of a whole meta-batch.
End = Callable[[Gradients], Gradients]


def averaged(found: Gradients) -> Gradients:
    """The gradient of the mean over tasks."""
    grads = torch._foreach_div(list(found.by_name.values()), len(found.losses))
    return found._replace(by_name=dict(zip(found.by_name, grads, strict=True)))


def concluded(found: Gradients, clip: float | None) -> Gradients:
    """A whole meta-batch's gradients, clipped, with their conclusion.

    Args:
        found: means over all tasks, detached; they stay as they are.
        clip: the largest norm of the whole gradient, as in `torch.nn.utils.clip_grad_norm_`; None leaves it.
    """
    grads = list(found.by_name.values())
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    if clip is not None:
        grads = list(torch._foreach_mul(grads, (clip / (norm + 1e-6)).clamp(max=1.0)))
    means = {name: value.mean() for name, value in found.metrics.items()}
    conclusion = Conclusion(norm, found.losses.sum() + norm, means)
    return found._replace(by_name=dict(zip(found.by_name, grads, strict=True)), conclusion=conclusion)


class NotCapturable(Exception):
    """Why a step cannot be a graph."""


def eager_gradients(meta_layer: MetaLayer, episode: Episode) -> Gradients:
    """The meta-gradient as autograd finds it; no `.grad` is touched."""
    learned = {name: p for name, p in meta_layer.named_parameters() if p.requires_grad}
    losses, metrics = meta_layer.meta_loss(episode)
    found = torch.autograd.grad(losses, list(learned.values()), torch.ones_like(losses), allow_unused=True)
    by_name = {
        name: laid_out(grad, learned[name]) for name, grad in zip(learned, found, strict=True) if grad is not None
    }
    return Gradients(losses.detach(), {name: value.detach() for name, value in metrics.items()}, by_name)


def laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient that lies in memory as its parameter does: fused optimizers walk through both side by side."""
    if grad.stride() == parameter.stride():
        return grad
    order, back = memory_order(parameter)
    return grad.permute(order).contiguous().permute(back)


class WholeStep:
    """The meta-gradient of a meta layer as one graph, for episodes of one shape.

    Args:
        meta_layer: the algorithm, in training mode.
        episode: the first of its shape.
        end: what follows from the gradients, as part of the graph: `concluded`, for whole meta-batches.

    Raises:
        NotCapturable: the step draws random numbers, or changes with the number of the outer step.
        Exception: whatever tracing and compiling raise.
    """

    def __init__(self, meta_layer: MetaLayer, episode: Episode, end: End | None = None) -> None:
        #: The names of metrics and of gradients, in the order in which the graph gives them.
        self.metrics: list[str] = []
        self.names: list[str] = []
        #: Parameters and buffers; finding them takes longer than a small step.
        self.held = list(tensors_of(meta_layer).values())
        inputs = self.inputs(episode)
        with tracing(meta_layer):
            graph = traced(self.flat_step(meta_layer, end), inputs)
            merge_products(graph.graph)
            fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
            self.compiled = compiled(graph, fakes, meta_layer)

    def __call__(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        with torch.no_grad():
            losses, *found = self.compiled(self.inputs(episode))
        count, end = len(self.metrics), len(self.metrics) + len(self.names)
        metrics, by_name = (
            dict(zip(names, values, strict=True))
            for names, values in ((self.metrics, found[:count]), (self.names, found[count:end]))
        )
        if len(found) == end:
            return Gradients(losses, metrics, by_name)
        norm, total, *means = found[end:]
        return Gradients(losses, metrics, by_name, Conclusion(norm, total, dict(zip(metrics, means, strict=True))))

    def inputs(self, episode: Episode) -> list[Any]:
        return [tensor.detach() for tensor in (*self.held, *episode.support, *episode.query)]

    def flat_step(self, meta_layer: MetaLayer, end: End | None) -> Callable[..., list[Tensor]]:
        """A function of tensors to the tensors of the result; notes what they are called."""
        names = list(tensors_of(meta_layer))
        learned = {name for name, p in meta_layer.named_parameters() if p.requires_grad}

        def step(*inputs: Tensor) -> list[Tensor]:
            held, data = inputs[: len(names)], inputs[len(names) :]
            tensors = {name: t.detach().requires_grad_(name in learned) for name, t in zip(names, held, strict=True)}
            episode = Episode(Examples(*data[:3]), Examples(*data[3:]))
            with torch.nn.utils.stateless._reparametrize_module(meta_layer, tensors):
                found = eager_gradients(meta_layer, episode)
            self.metrics[:], self.names[:] = found.metrics, found.by_name
            with torch.no_grad():
                losses, metrics, by_name, conclusion = found if end is None else end(found)
            last = () if conclusion is None else (conclusion.norm, conclusion.total, *conclusion.means.values())
            return [losses, *metrics.values(), *by_name.values(), *last]

        return step


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """A function of tensors as a graph of what inductor knows, without operations in place."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, {**select_decomp_table(), **TRACED}, tracing_mode="fake")(*inputs)
    if any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in graph.graph.nodes):
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"), tracing_mode="fake")(*inputs)
    return graph


def compiled(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], meta_layer: MetaLayer
) -> Callable[[list[Tensor]], Any]:
    """What inductor makes of a graph; it is called with a list of inputs, which it empties."""
    keep_what_is_compiled()
    from torch._inductor.compile_fx import compile_fx_inner

    reject_random_numbers(graph, meta_layer)
    keep_strides(graph)
    lay_out(graph.graph)
    graph.recompile()
    settings = inductor_settings(meta_layer)
    with torch._inductor.config.patch(settings), cached(inputs):
        return compile_fx_inner(graph, inputs, cpp_wrapper=settings.get("cpp_wrapper", False))


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
        tensors = [packed(leaf) for leaf in flat if isinstance(leaf, Tensor)]
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


def packed(x: Tensor) -> Tensor:
    """A tensor without gaps; what has five axes is images, or weights of convolutions, and has channels last."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 5 else x.contiguous()


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
        from functorch.compile import aot_function, default_partition, min_cut_rematerialization_partition
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
            # As the next unit takes them, so that nothing is copied in between.
            return [packed(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return compiled(graph, inputs, meta_layer)

        # A step of an inner loop computes anew what is cheap, rather than keep it for each step. Of features, which are
        # found once, that makes the backward pass twice as slow.
        once = getattr(function, "__func__", None) is MetaLayer.call_base_layer
        self.compiled = aot_function(
            flattened,
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=default_partition if once else min_cut_rematerialization_partition,
            decompositions={**select_decomp_table(), **TRACED},
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


@contextmanager
def cached(inputs: Sequence[Any]) -> Iterator[None]:
    """Lets inductor take from its cache what it has compiled before, which it does only where it knows the shapes."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = torch._guards.detect_fake_mode(inputs)
    if mode is None:
        yield
        return
    mode.shape_env = mode.shape_env or ShapeEnv()
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield


def keep_strides(graph: torch.fx.GraphModule) -> None:
    """Tells inductor to let results lie in memory as they were traced: so the backward pass was told to take them."""
    (output,) = graph.graph.find_nodes(op="output")
    found = [index for index, node in enumerate(output.args[0]) if isinstance(node, torch.fx.Node)]
    output.meta["user_visible_output_idxs"] = found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def keep_what_is_compiled() -> None:
    """Names the folder of what inductor compiles, unless the user has."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch names its own, which does not outlive the system's temporary files, as soon as there is an optimizer.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")


def inductor_settings(meta_layer: MetaLayer) -> dict[str, Any]:
    """What differs from inductor's defaults, for the device of the meta layer."""
    if next(meta_layer.parameters()).device.type != "cpu":
        return {}
    settings: dict[str, Any] = {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
    settings["layout_optimization"] = False  # a second opinion on how images lie, beside `lay_out`'s
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
