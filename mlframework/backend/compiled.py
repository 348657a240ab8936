"""Functions of tensors as compiled graphs, and the meta-gradient as one of them.

`make_fx` traces through the gradients that an inner loop takes, which `torch.compile` does not, and inductor compiles
what it finds. Parameters and buffers of the meta layer are inputs of a graph, not part of it.
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlframework.backend.graph_passes import lay_out, memory_order, merge_products
from mlframework.backend.operators import TRACED
from mlframework.backend.swap_tensors import swap_tensors
from mlframework.backend.traced_int import TracedInt
from mlframework.episode import Episode, Examples
from mlframework.files import cache_folder
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics

__all__ = [
    "End",
    "Gradients",
    "NotCapturable",
    "StepSummary",
    "WholeStep",
    "averaged",
    "eager_gradients",
    "summarised",
]


#: Where a module holds a tensor, and by what name.
Place = tuple[dict[str, Any], str]

#: For what a processor may have, where inductor makes use of it.
EXTENSIONS = ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx512vnni")

#: Outer steps ahead at which a graph has to be the same.
LATER = 1000


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
    conclusion: StepSummary | None = None


class StepSummary(NamedTuple):
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


def summarised(found: Gradients, clip: float | None) -> Gradients:
    """A whole meta-batch's gradients, clipped, with their conclusion.

    Args:
        found: means over all tasks, detached; they stay as they are.
        clip: the largest norm of the whole gradient, as in `torch.nn.utils.clip_grad_norm_`; None leaves it.
    """
    grads = list(found.by_name.values())
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))
    if clip is not None:
        grads = list(torch._foreach_mul(grads, (clip / (norm + 1e-6)).clamp(max=1.0)))
    means = {name: value.mean() for name, value in found.metrics.items()}
    conclusion = StepSummary(norm, found.losses.sum() + norm, means)
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
        end: what follows from the gradients, as part of the graph: `summarised`, for whole meta-batches.

    Raises:
        NotCapturable: the step draws random numbers, or changes with the number of the outer step.
        Exception: whatever tracing and compiling raise.
    """

    def __init__(self, meta_layer: MetaLayer, episode: Episode, end: End | None = None) -> None:
        #: The names of metrics and of gradients, in the order in which the graph gives them.
        self.metrics: list[str] = []
        self.names: list[str] = []
        self.places: list[Place] = []
        step, inputs = self.flat_step(meta_layer, end), self.inputs(meta_layer, episode)
        with tracing(meta_layer):
            graph = traced(step, inputs)
        with tracing(meta_layer, later=LATER):
            if not is_same(graph, traced(step, inputs)):
                raise changes_with_step(meta_layer)
        merge_products(graph.graph)
        self.compiled = compiled(graph, meta_layer)

    def __call__(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        with torch.no_grad():
            losses, *found = self.compiled(self.inputs(meta_layer, episode))
        count, end = len(self.metrics), len(self.metrics) + len(self.names)
        metrics, by_name = (
            dict(zip(names, values, strict=True))
            for names, values in ((self.metrics, found[:count]), (self.names, found[count:end]))
        )
        if len(found) == end:
            return Gradients(losses, metrics, by_name)
        norm, total, *means = found[end:]
        return Gradients(losses, metrics, by_name, StepSummary(norm, total, dict(zip(metrics, means, strict=True))))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "places": []}

    def inputs(self, meta_layer: MetaLayer, episode: Episode) -> list[Any]:
        self.places = self.places or places_of(meta_layer)
        return [tensor.detach() for tensor in (*found_at(self.places), *episode.support, *episode.query)]

    def flat_step(self, meta_layer: MetaLayer, end: End | None) -> Callable[..., list[Tensor]]:
        """A function of tensors to the tensors of the result; notes what they are called."""
        names = list(tensors_of(meta_layer))
        learned = {name for name, p in meta_layer.named_parameters() if p.requires_grad}

        def step(*inputs: Tensor) -> list[Tensor]:
            held, data = inputs[: len(names)], inputs[len(names) :]
            tensors = {name: t.detach().requires_grad_(name in learned) for name, t in zip(names, held, strict=True)}
            episode = Episode(Examples(*data[:3]), Examples(*data[3:]))
            with swap_tensors(meta_layer, tensors):
                found = eager_gradients(meta_layer, episode)
            self.metrics[:], self.names[:] = found.metrics, found.by_name
            with torch.no_grad():
                losses, metrics, by_name, conclusion = found if end is None else end(found)
            last = () if conclusion is None else (conclusion.norm, conclusion.total, *conclusion.means.values())
            return [losses, *metrics.values(), *by_name.values(), *last]

        return step


#: Operations on lists of tensors, for each: inductor fuses them as it does others, and for GPUs has made kernels of the
#: lists that did not compile (torch 2.11).
ONE_BY_ONE: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._foreach_div.Scalar: lambda tensors, divisor: [t / divisor for t in tensors],
    torch.ops.aten._foreach_mul.Tensor: lambda tensors, factor: [t * factor for t in tensors],
}


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """A function of tensors as a graph of what inductor knows, without operations in place."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, {**select_decomp_table(), **TRACED, **ONE_BY_ONE}, tracing_mode="fake")(*inputs)
    if any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in graph.graph.nodes):
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"), tracing_mode="fake")(*inputs)
    return graph


def compiled(graph: torch.fx.GraphModule, meta_layer: MetaLayer, **settings: Any) -> CompiledGraph:
    """What inductor makes of a graph, whose nodes have their fake tensors, with settings beside its usual ones."""
    from torch._inductor.compile_fx import compile_fx_inner

    reject_random_numbers(graph, meta_layer)
    remember_indices()
    keep_strides(graph)
    lay_out(graph.graph)
    graph.recompile()
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    settings = {**inductor_settings(meta_layer), **settings}
    with set_up(settings), cached(inputs):
        return CompiledGraph(compile_fx_inner(graph, inputs, cpp_wrapper=settings.get("cpp_wrapper", False)), settings)


class CompiledGraph:
    """A compiled function of tensors. Pickled, it refers to what inductor keeps in its own folder.

    Args:
        code: what inductor has made.
        settings: with which.
    """

    def __init__(self, code: Any, settings: dict[str, Any]) -> None:
        self.code, self.settings = code, settings
        # Straight to what was compiled: the way around it, for tracing and tuning, imports the compiler.
        self.function: Callable[[list[Tensor]], Any] = getattr(code, "current_callable", None) or code

    def __call__(self, inputs: list[Tensor]) -> Any:
        """The results; the list is empty afterwards, so that nothing outlives its last use."""
        return self.function(inputs)

    def __getstate__(self) -> Any:
        code = copy.copy(self.code)
        code.prepare_for_serialization()
        return code, self.settings

    def __setstate__(self, state: Any) -> None:
        from torch._inductor.output_code import CompiledFxGraphConstants

        code, settings = state
        constants = CompiledFxGraphConstants()
        with set_up(settings):
            code.after_deserialization(constants)
            code.post_compile((), constants, code.fx_kwargs)
        self.__init__(code, settings)  # type: ignore[misc]


@contextmanager
def set_up(settings: dict[str, Any]) -> Iterator[None]:
    """Inductor with settings, and with its folder."""
    import torch._inductor.config

    keep_what_is_compiled()
    with torch._inductor.config.patch(settings):
        yield


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


def remember_indices() -> None:
    """Lets inductor remember how it has simplified an index: it asks for each several times, and keeps the last 128."""
    from torch._inductor import sizevars

    simplify: Any = getattr(sizevars, "simplify_index_in_vec_range", None)
    if hasattr(simplify, "cache_parameters") and simplify.cache_parameters()["maxsize"] == 128:
        sizevars.simplify_index_in_vec_range = functools.lru_cache(maxsize=8192)(simplify.__wrapped__)


def keep_strides(graph: torch.fx.GraphModule) -> None:
    """Tells inductor to let results lie in memory as they were traced: so the backward pass was told to take them."""
    (output,) = graph.graph.find_nodes(op="output")
    found = [index for index, node in enumerate(output.args[0]) if isinstance(node, torch.fx.Node)]
    output.meta["user_visible_output_idxs"] = found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def places_of(module: nn.Module) -> list[Place]:
    """Where parameters and buffers are held, and may be replaced; to find them takes longer than a small step."""
    places = []
    for name in tensors_of(module):
        owner, _, own = name.rpartition(".")
        part = module.get_submodule(owner)
        places.append((part._parameters if own in part._parameters else part._buffers, own))
    return places


def found_at(places: list[Place]) -> list[Tensor]:
    return [tensors[name] for tensors, name in places]


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
    if "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS" not in os.environ:
        # They save a second or two of each graph, and take ten, once, and 150 MB of temporary files.
        settings["cpp_cache_precompile_headers"] = False
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        # inductor writes vectors itself, and turns the compiler's own vectorising off, on which its masks depend: they
        # are ten times slower without. The flag is handed over where it comes after the one that turns it off.
        settings["cpp.march"] = "native -ftree-loop-vectorize"
        if "TORCHINDUCTOR_VEC_ISA_OK" not in os.environ and compiler_knows_extensions():
            # To compile a trial of each, with torch's headers, takes as long as a small graph.
            settings["cpp.vec_isa_ok"] = True
    return settings


@functools.cache
def compiler_knows_extensions() -> bool:
    """Whether the C++ compiler takes the flags of all `EXTENSIONS`."""
    command = [os.environ.get("CXX", "g++"), *EXTENSIONS, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:  # there is none, or it is not named so
        return False


@contextmanager
def tracing(meta_layer: MetaLayer, later: int = 0) -> Iterator[None]:
    """Refuses to trace what changes with the number of the outer step.

    Args:
        meta_layer: what is traced.
        later: how many outer steps it is taken to be ahead.
    """
    before, meta_layer.outer_step = meta_layer.outer_step, TracedInt(meta_layer.outer_step + later)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            yield
        if meta_layer.outer_step.touched:
            raise changes_with_step(meta_layer)
    finally:
        meta_layer.outer_step = before


def changes_with_step(meta_layer: MetaLayer) -> NotCapturable:
    return NotCapturable(f"{type(meta_layer).__name__} changes with the number of the outer step")


def is_same(graph: torch.fx.GraphModule, other: torch.fx.GraphModule) -> bool:
    """Whether two graphs do the same, with the same constants."""
    if graph.code != other.code:
        return False
    names = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return all(torch.equal(getattr(graph, name), getattr(other, name)) for name in names)


def reject_random_numbers(graph: torch.fx.GraphModule, meta_layer: MetaLayer) -> None:
    """Raises `NotCapturable` if a graph draws random numbers."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotCapturable(f"{type(meta_layer).__name__} draws random numbers ({node.target})")
