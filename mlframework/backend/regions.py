"""Whole steps as one graph; and regions, which a step calls again and again, as a forward and a backward pass each.

The steps of an inner loop are one region, so that compiling takes as long for fifty as for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from mlframework.backend.algorithm import Algorithm, GradientFn, Held, tensors_of
from mlframework.backend.forward import compiled_by, swap_tensors
from mlframework.backend.graph_cache import GraphCache
from mlframework.backend.graph_passes import merge_products, sink
from mlframework.backend.inductor import CompiledGraph, compiled
from mlframework.backend.private import (
    partition,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
    without_saved_tensor_hooks,
)
from mlframework.backend.tracing import LATER, NotCapturable, TracedInt, changes_with_step, is_same, traced, tracing
from mlframework.episode import Episode

__all__ = ["NotCompiled", "RegionCompiler", "compile_step"]

#: Stands, while a region is traced, for the gradient by a result, which only the backward pass is given.
tangent = torch.library.custom_op(
    "mlframework::tangent", torch.empty_like, mutates_args=(), schema="(Tensor x) -> Tensor"
)
tangent.register_fake(torch.empty_like)


class NotCompiled(Exception):
    """A region that has not been compiled."""


class RegionCompiler:
    """Calls regions, functions of arguments and of the meta layer's tensors, compiled once for each shape of arguments.

    Nothing may be changed in place in what a region returns: results can share memory.

    Raises:
        NotCompiled: a region is new, outside of a check, in which alone regions are compiled.
    """

    def __init__(self, meta_layer: Algorithm, cache: GraphCache) -> None:
        self.meta_layer, self.cache, self.held = meta_layer, cache, Held(meta_layer)
        self.regions: dict[Any, CompiledRegion] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, recompute: bool = True) -> Any:
        # One layout in memory: parameters start as views that all tasks share.
        args = tree_map_only(Tensor, packed, args)
        flat, structure = tree_flatten(args)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        numbers = tuple(leaf for leaf in flat if type(leaf) is int)
        others = tuple(leaf for leaf in flat if not isinstance(leaf, Tensor) and type(leaf) is not int)
        shapes = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
        key = (function.__module__, function.__qualname__, structure, shapes, others, torch.is_grad_enabled())
        # A number such as that of an inner step often makes no difference: then one region serves all.
        region = self.regions.get((key, None)) or self.regions.get((key, numbers))
        if region is None:
            if not self.cache.checking:
                raise NotCompiled
            build = functools.partial(compile_region, self.meta_layer, function, args, recompute)
            region = self.cache.get(build, self.meta_layer, "region", key, numbers)
            self.regions[key, numbers if region.depends_on_numbers else None] = region
        return region(*self.held(), *tensors)


def packed(x: Tensor) -> Tensor:
    """A tensor without gaps; five axes are images, or weights of convolutions, and have channels last."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 5 else x.contiguous()


class Slot(int):
    """The number of a tensor among the inputs of a region and the results of its forward pass."""


class Form(NamedTuple):
    """How the value of a function is made of tensors."""

    value: Any  # with slots for tensors
    results: list[tuple[tuple[int, ...], bool]]  # the strides of each result, and whether it has a gradient


@dataclass
class CompiledRegion:
    """A compiled function of tensors to nests of tensors, for tensors of one shape.

    Attributes:
        forward: gives the results, and then the tensors that the backward pass reads.
        backward: from those and the gradients by the results, the gradients by the inputs; None if there are none.
    """

    form: Form
    depends_on_numbers: bool  # whether a number among the arguments makes a difference
    forward: CompiledGraph
    backward: CompiledGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.backward is None:
            with torch.no_grad():
                found = self.forward(list(inputs))
        else:
            found = Differentiable.apply(self, *inputs)
        return filled(self.form.value, (*inputs, *found))


def filled(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    """A value with tensors in its slots; dictionaries and named tuples are made faster than torch makes them."""
    if isinstance(value, Slot):
        return tensors[value]
    if type(value) is dict:
        return {name: filled(part, tensors) for name, part in value.items()}
    if hasattr(value, "_make"):
        return value._make(filled(part, tensors) for part in value)
    return tree_map_only(Slot, tensors.__getitem__, value)


class Differentiable(torch.autograd.Function):
    """A region with its gradient, which can be taken any number of times, but not differentiated.

    Raises:
        NotCapturable: the gradient is to be differentiated.
    """

    @staticmethod
    def forward(ctx: Any, region: CompiledRegion, *inputs: Tensor) -> tuple[Tensor, ...]:
        found, ctx.region = region.forward(list(inputs)), region
        ctx.save_for_backward(*found[len(region.form.results) :])
        results: dict[int, Tensor] = {}
        without: list[Tensor] = []
        for x, (_, has_grad) in zip(found, region.form.results, strict=False):
            # One tensor, as a value and the same detached, is two results.
            x = x if has_grad and id(x) not in results else x.detach()
            results[id(x)] = x
            without += [] if has_grad else [x]
        ctx.mark_non_differentiable(*without)
        return tuple(results.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotCapturable("the gradient of a compiled region cannot be differentiated again")
        region: CompiledRegion = ctx.region
        assert region.backward is not None
        tangents = [
            grad if grad.stride() == strides else grad.new_empty_strided(grad.shape, strides).copy_(grad)
            for grad, (strides, has_grad) in zip(grads, region.form.results, strict=True)
            if has_grad
        ]
        return None, *region.backward([*ctx.saved_tensors, *tangents])


class Trace(NamedTuple):
    """A region as a graph of its results, and then of the gradients by the inputs."""

    graph: fx.GraphModule
    form: Form
    touched: bool  # whether the function is known to have computed with a number among the arguments


def compile_step(meta_layer: Algorithm, episode: Episode, step: GradientFn) -> CompiledRegion:
    """A step of a meta layer in training mode as one graph, for episodes of one shape.

    Raises:
        NotCapturable: the step draws random numbers, or changes with the number of the outer step.
        Exception: whatever tracing and compiling raise.
    """
    call = meta_layer, functools.partial(step, meta_layer), (episode,)
    first = trace(*call)
    if not is_same_later(first, *call, ahead=0):
        raise changes_with_step(meta_layer)
    merge_products(first.graph.graph)
    return CompiledRegion(first.form, False, compiled(first.graph, meta_layer))


def compile_region(
    meta_layer: Algorithm, function: Callable[..., Any], args: tuple[Any, ...], recompute: bool
) -> CompiledRegion:
    """Traces and compiles a function for arguments of such shapes; for `recompute` see `region`.

    Raises:
        NotCapturable: it depends on the number of the outer step, or draws random numbers.
    """
    # In the layout in which the next region takes them, so that nothing is copied in between.
    call = meta_layer, lambda *args: tree_map_only(Tensor, packed, function(*args)), args
    with without_saved_tensor_hooks():
        first = trace(*call)
        depends = first.touched or not is_same_later(first, *call, ahead=1)
        if depends and not is_same_later(first, *call, ahead=0):
            raise changes_with_step(meta_layer)
    results, passes = first.form.results, [first.graph]
    if any(has_grad for _, has_grad in results):
        mark_passes(first.graph)
        passes = [*partition(first.graph, outputs=len(results), keep_all=not recompute)]
    for part in passes:
        sink(part.graph)
    # torch's own order takes least memory, but separates operations that read the same tensors.
    programs = [compiled(part, meta_layer, reorder_for_peak_memory=False) for part in passes]
    return CompiledRegion(first.form, depends, *programs)


def is_same_later(first: Trace, *call: Any, ahead: int) -> bool:
    """Whether tracing gives the same at a later outer step, with numbers among the arguments that are ahead."""
    try:
        later = trace(*call, ahead=ahead, later=LATER)
        return is_same(first.graph, later.graph, call[0]) and first.form == later.form
    except NotCapturable:
        raise
    except Exception:  # as where a table has no such row
        return False


def trace(
    meta_layer: Algorithm, function: Callable[..., Any], args: tuple[Any, ...], *, ahead: int = 0, later: int = 0
) -> Trace:
    """Traces a function and its gradients, `ahead` added to its numbers and `later` to that of the outer step."""
    held, (flat, structure) = tensors_of(meta_layer), tree_flatten(args)
    inputs = [*held.values(), *(leaf for leaf in flat if isinstance(leaf, Tensor))]
    learned = [x.requires_grad and torch.is_grad_enabled() for x in inputs]
    others = [TracedInt(leaf + ahead) if type(leaf) is int else leaf for leaf in flat]
    forms: list[Form] = []

    def joint(*inputs: Tensor) -> list[Tensor | None]:
        """The results, and then the gradients by the inputs; notes the leaves and strides of the value."""
        inputs = tuple(x.detach().requires_grad_(needed) for x, needed in zip(inputs, learned, strict=True))
        tensors = iter(inputs[len(held) :])
        args = tree_unflatten([next(tensors) if isinstance(x, Tensor) else x for x in others], structure)
        with swap_tensors(cast(nn.Module, meta_layer), dict(zip(held, inputs, strict=False))):
            value, nesting = tree_flatten(function(*args))
        leaves, found = in_slots(value, inputs)
        # A function may have leaves of its own, by which no gradient is wanted.
        results = [(x.stride(), x.requires_grad and any(learned)) for x in found]
        forms[:] = [Form(tree_unflatten(leaves, nesting), results)]
        return [*found, *gradients_by(inputs, [x for x, (_, has_grad) in zip(found, results, strict=True) if has_grad])]

    with compiled_by(None), tracing(meta_layer, later):
        graph = traced(joint, inputs)
    touched = any(isinstance(leaf, TracedInt) and leaf.touched for leaf in others)
    return Trace(graph, forms[-1], touched)


def in_slots(value: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
    """A value's leaves, with slots for tensors; and its tensors that are no inputs, each once."""
    slots = {id(x): Slot(index) for index, x in enumerate(inputs)}
    found = []
    for leaf in value:
        if isinstance(leaf, Tensor) and id(leaf) not in slots:
            slots[id(leaf)] = Slot(len(slots))
            found.append(leaf)
    return [slots.get(id(leaf), leaf) for leaf in value], found


def gradients_by(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The gradients by every input, given tangents of the results; nothing where there are no results."""
    if not results:
        return
    tangents = [tangent(x.detach()) for x in results]
    needed = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(results, needed, tangents, allow_unused=True))
    yield from (next(grads) if x.requires_grad else None for x in inputs)


def mark_passes(graph: fx.GraphModule) -> None:
    """Makes tangents inputs; tells the partitioner that all nodes from the first one on are the backward pass."""
    nodes = graph.graph
    tag = "is_forward"
    last = list(nodes.find_nodes(op="placeholder"))[-1]
    for node in list(nodes.nodes):
        if node.target is torch.ops.mlframework.tangent.default:
            tag = "is_backward"
            with nodes.inserting_after(last):
                last = nodes.placeholder(f"tangents_{node.name}")  # the partitioner knows tangents by this name
            last.meta = {"val": node.meta["val"], "partitioner_tag": tag}
            node.replace_all_uses_with(last)
            nodes.erase_node(node)
        else:
            node.meta["partitioner_tag"] = tag
    graph.recompile()
