"""Functions that a step calls again and again, each as a compiled forward and backward pass.

What a step repeats, as the steps of an inner loop, is compiled once, however often it is repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mlframework.backend.compiled import (
    LATER,
    CompiledGraph,
    NotCapturable,
    changes_with_step,
    compiled,
    found_at,
    is_same,
    places_of,
    tensors_of,
    traced,
    tracing,
)
from mlframework.backend.forward import compiled_by
from mlframework.backend.graph_cache import GraphCache
from mlframework.backend.graph_passes import sink
from mlframework.backend.operators import define, named
from mlframework.backend.swap_tensors import swap_tensors
from mlframework.backend.traced_int import TracedInt, traced_int
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["NotCompiled", "Units"]

#: Stands for a tensor among the arguments of a function.
TENSOR = object()

#: Stands, while a unit is traced, for the gradient by a result, which only the backward pass is given.
define("tangent(Tensor x) -> Tensor", torch.empty_like, torch.empty_like)


class NotCompiled(Exception):
    """A function that no unit is there for."""


class Units:
    """Compiles every `region`, each with its backward pass, once for each shape.

    Nothing may be changed in place in what it returns: results can share memory.

    Args:
        meta_layer: whose parameters and buffers the functions may use, beside their arguments.
        kept: where units are kept between processes.

    Raises:
        NotCompiled: what is called has not been compiled yet, and nobody is checking what is.
    """

    def __init__(self, meta_layer: MetaLayer, kept: GraphCache) -> None:
        self.meta_layer, self.kept = meta_layer, kept
        self.places = places_of(meta_layer)
        self.units: dict[Any, Unit] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, recompute: bool = True) -> Any:
        flat, structure = tree_flatten(args)
        # One way to lie in memory: parameters start as views that all tasks share.
        tensors = [packed(leaf) for leaf in flat if isinstance(leaf, Tensor)]
        numbers = tuple(leaf for leaf in flat if type(leaf) is int)
        others = tuple(leaf for leaf in flat if not isinstance(leaf, Tensor) and type(leaf) is not int)
        shapes = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
        key = (function.__module__, function.__qualname__, structure, shapes, others, torch.is_grad_enabled())
        # A number like that of an inner step often makes no difference: one unit is then there for all.
        unit = self.units.get((key, None)) or self.units.get((key, numbers))
        if unit is None:
            if not self.kept.checking:
                raise NotCompiled
            leaves = [packed(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            builder = functools.partial(build, self.meta_layer, function, leaves, structure, recompute)
            unit = self.kept.get(builder, self.meta_layer, "unit", key, numbers)
            self.units[key, numbers if unit.depends_on_numbers else None] = unit
        return unit(*found_at(self.places), *tensors)


def packed(x: Tensor) -> Tensor:
    """A tensor without gaps; what has five axes is images, or weights of convolutions, and has channels last."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 5 else x.contiguous()


class Slot(int):
    """The number of a tensor among the inputs of a unit and the results of its forward pass."""


@dataclass
class Unit:
    """A compiled function of tensors to nests of tensors, for tensors of one shape.

    Attributes:
        leaves: of the function's value: slots of tensors, and what else there is.
        structure: how they are nested.
        results: of each tensor that the forward pass finds for them, its strides, and whether it has a gradient.
        depends_on_numbers: whether a number among the arguments makes a difference.
        forward: gives the results, and then what the backward pass reads.
        backward: from what the forward pass has left for it, and gradients by the results, the gradients by the inputs;
            None where there are none.
    """

    leaves: list[Any]
    structure: TreeSpec
    results: list[tuple[tuple[int, ...], bool]]
    depends_on_numbers: bool
    forward: CompiledGraph
    backward: CompiledGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.backward is None:
            with torch.no_grad():
                found = self.forward(list(inputs))
        else:
            found = Differentiable.apply(self, *inputs)
        tensors = (*inputs, *found)
        return tree_unflatten(
            [tensors[leaf] if isinstance(leaf, Slot) else leaf for leaf in self.leaves], self.structure
        )


class Differentiable(torch.autograd.Function):
    """A unit with its gradient, which can be taken any number of times, but not differentiated.

    Raises:
        NotCapturable: somebody wants to differentiate the gradient.
    """

    @staticmethod
    def forward(ctx: Any, unit: Unit, *inputs: Tensor) -> tuple[Tensor, ...]:
        found, count = unit.forward(list(inputs)), len(unit.results)
        ctx.unit = unit
        ctx.save_for_backward(*found[count:])
        results: dict[int, Tensor] = {}
        for x, (_, has_grad) in zip(found, unit.results, strict=False):
            # What is one tensor, as a value and the same detached, are two results.
            x = x if has_grad and id(x) not in results else x.detach()
            results[id(x)] = x
        ctx.mark_non_differentiable(
            *(x for x, (_, has_grad) in zip(results.values(), unit.results, strict=True) if not has_grad)
        )
        return tuple(results.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotCapturable("the gradient of a compiled function cannot be differentiated again")
        unit: Unit = ctx.unit
        assert unit.backward is not None
        parts = zip(grads, unit.results, strict=True)
        tangents = [lying(grad, strides) for grad, (strides, has_grad) in parts if has_grad]
        return None, *unit.backward([*ctx.saved_tensors, *tangents])


def lying(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor with given strides."""
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def build(
    meta_layer: MetaLayer, function: Callable[..., Any], flat: Sequence[Any], structure: TreeSpec, recompute: bool
) -> Unit:
    """Traces and compiles a function.

    Args:
        meta_layer, function: see `Units`.
        flat: the arguments, flattened, packed.
        structure: how they were nested.
        recompute: see `region`.
    """
    held = tensors_of(meta_layer)
    inputs = [*held.values(), *(leaf for leaf in flat if isinstance(leaf, Tensor))]
    learned = [x.requires_grad and torch.is_grad_enabled() for x in inputs]

    def trace(ahead: int = 0, later: int = 0) -> Trace:
        """At numbers among the arguments, and at an outer step, that are so much ahead."""
        others = [TENSOR if isinstance(leaf, Tensor) else traced_int(leaf, ahead) for leaf in flat]
        notes: list[Any] = []

        def joint(*inputs: Tensor) -> list[Tensor | None]:
            """The results, and then the gradients by the inputs; notes what they are."""
            inputs = tuple(x.detach().requires_grad_(needed) for x, needed in zip(inputs, learned, strict=True))
            tensors = iter(inputs[len(held) :])
            args = tree_unflatten([next(tensors) if leaf is TENSOR else leaf for leaf in others], structure)
            with swap_tensors(meta_layer, dict(zip(held, inputs, strict=False))):
                value, nesting = tree_flatten(function(*args))
            # As the next unit takes them, so that nothing is copied in between.
            value = [packed(leaf) if isinstance(leaf, Tensor) else leaf for leaf in value]
            slots = {id(x): Slot(index) for index, x in enumerate(inputs)}
            found = []
            for leaf in value:
                if isinstance(leaf, Tensor) and id(leaf) not in slots:
                    slots[id(leaf)] = Slot(len(slots))
                    found.append(leaf)
            # A function may have leaves of its own, whose gradient nobody wants.
            results = [(x.stride(), x.requires_grad and any(learned)) for x in found]
            notes[:] = [slots.get(id(leaf), leaf) for leaf in value], nesting, results
            by = [x for x, (_, has_grad) in zip(found, results, strict=True) if has_grad]
            if not by:
                return [*found]
            tangents = [named("mlframework::tangent")(x.detach()) for x in by]
            of = [x for x in inputs if x.requires_grad]
            grads = iter(torch.autograd.grad(by, of, tangents, allow_unused=True))
            return [*found, *(next(grads) if needed else None for needed in learned)]

        with compiled_by(None), tracing(meta_layer, later), without_hooks():
            graph = traced(joint, inputs)
        leaves, nesting, results = notes
        touched = any(isinstance(leaf, TracedInt) and leaf.touched for leaf in others)
        return Trace(graph, leaves, nesting, results, touched)

    def agrees(ahead: int) -> bool:
        """Whether at a later outer step, and at other numbers, the same is found."""
        try:
            return first.is_same(trace(ahead, LATER))
        except NotCapturable:
            raise
        except Exception:  # as of a table that has no such row
            return False

    first = trace()
    depends = first.touched or not agrees(ahead=1)
    if depends and not agrees(ahead=0):
        raise changes_with_step(meta_layer)
    results = first.results
    learns = any(has_grad for _, has_grad in results)
    passes = parted(first.graph, len(results), recompute) if learns else (first.graph,)
    for part in passes:
        sink(part.graph)
    # torch's own order is that of least memory, in which what is read together is not found together.
    programs = [compiled(part, meta_layer, reorder_for_peak_memory=False) for part in passes]
    return Unit(first.leaves, first.structure, results, depends, *programs)


class Trace(NamedTuple):
    """What is found where a function is traced.

    Attributes:
        graph: the results, and then the gradients by the inputs.
        leaves, structure, results: see `Unit`.
        touched: whether anybody is known to have computed with a number among the arguments.
    """

    graph: fx.GraphModule
    leaves: list[Any]
    structure: TreeSpec
    results: list[tuple[tuple[int, ...], bool]]
    touched: bool

    def is_same(self, other: Trace) -> bool:
        """Whether the same is computed, with the same constants, and returned."""
        values = (self.leaves, self.structure, self.results)
        return values == (other.leaves, other.structure, other.results) and is_same(self.graph, other.graph)


@contextmanager
def without_hooks() -> Iterator[None]:
    """Lets nobody hook what a function keeps for its own gradients, as checkpoints do."""
    torch._C._autograd._saved_tensors_hooks_disable("what is traced keeps its tensors itself", False)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_enable()


def parted(graph: fx.GraphModule, count: int, recompute: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward pass and the backward pass of a graph whose first results are those of the forward pass.

    Args:
        graph: as `build` traces it; it is changed.
        count: how many results the forward pass has.
        recompute: see `region`.
    """
    from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

    nodes = graph.graph
    tag = "is_forward"
    last = list(nodes.find_nodes(op="placeholder"))[-1]
    for node in list(nodes.nodes):
        if node.target is named("mlframework::tangent").default:
            tag = "is_backward"
            with nodes.inserting_after(last):
                last = nodes.placeholder(f"tangents_{node.name}")  # by this name it is known for one
            last.meta = {"val": node.meta["val"], "partitioner_tag": tag}
            node.replace_all_uses_with(last)
            nodes.erase_node(node)
        else:
            node.meta["partitioner_tag"] = tag
    graph.recompile()
    partition = min_cut_rematerialization_partition if recompute else default_partition
    # What is elementwise is found anew wherever that leaves less to keep: a step waits for memory more than for it.
    with torch._functorch.config.patch(aggressive_recomputation=True):
        return partition(graph, (), num_fwd_outputs=count)
