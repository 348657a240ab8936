"""Functions of tensors as graphs, and what a graph refuses.

`make_fx` traces through the gradients that an inner loop takes, which `torch.compile` does not. Parameters and buffers
of the meta layer are inputs of a graph, not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from mlframework.backend.algorithm import Algorithm
from mlframework.backend.private import WITH_CONSTANTS, decompositions, is_mutable, tree_flatten

__all__ = [
    *("LATER", "NotCapturable", "TracedInt", "changes_with_step", "is_same", "is_traced"),
    *("reject_what_changes", "traced", "tracing", "while_traced"),
]

#: Outer steps ahead at which a graph has to be the same.
LATER = 1000

TRACED = ContextVar("traced", default=False)


class NotCapturable(Exception):
    """Why a step cannot be a graph."""


def is_traced() -> bool:
    """Whether tensors stand for others, in a graph: some layers are then written in other operations, which fuse."""
    return TRACED.get()


@contextmanager
def while_traced() -> Iterator[None]:
    """Within this context `is_traced()` is true."""
    token = TRACED.set(True)
    try:
        yield
    finally:
        TRACED.reset(token)


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """A function of tensors as a graph of operators that inductor knows, without operations in place."""
    from torch.fx.experimental.proxy_tensor import make_fx

    settings = {"tracing_mode": "fake", **WITH_CONSTANTS}
    with while_traced():
        graph = make_fx(function, decompositions(), **settings)(*inputs)
    if any(is_mutable(node.target) for node in graph.graph.nodes):
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"), **settings)(*inputs)
    return graph


@contextmanager
def tracing(meta_layer: Algorithm, later: int = 0) -> Iterator[None]:
    """Refuses to trace a function that reads the number of the outer step, which is `later` steps ahead meanwhile."""
    before, meta_layer.outer_step = meta_layer.outer_step, TracedInt(meta_layer.outer_step + later)
    try:
        yield
        if meta_layer.outer_step.touched:
            raise changes_with_step(meta_layer)
    finally:
        meta_layer.outer_step = before


def changes_with_step(meta_layer: Algorithm) -> NotCapturable:
    return NotCapturable(f"{type(meta_layer).__name__} changes with the number of the outer step")


def is_same(graph: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two graphs do the same, with the same constants."""
    names = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return graph.code == other.code and all(torch.equal(getattr(graph, name), getattr(other, name)) for name in names)


def reject_what_changes(graph: fx.GraphModule, meta_layer: Algorithm) -> None:
    """Raises `NotCapturable` if a graph draws random numbers, or may hold state of the meta layer as a constant."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotCapturable(f"{type(meta_layer).__name__} draws random numbers ({node.target})")
    for part in cast("nn.Module", meta_layer).modules() if graph.graph.find_nodes(op="get_attr") else ():
        for name in vars(part).keys() - vars(nn.Module()).keys():
            if any(isinstance(leaf, Tensor) for leaf in tree_flatten(getattr(part, name))[0]):
                why = "is neither parameter nor buffer: a compiled step would keep its value; register it as a buffer"
                raise NotCapturable(f"{type(part).__name__}.{name} {why}")


class TracedInt(int):
    """A number that notices when Python code computes or compares with it, since a graph would hold it as a constant.

    torch and C code read it unnoticed, as `tensor * n` does: so functions are traced with another number as well.
    """

    touched = False


def watch(name: str) -> Callable[..., Any]:
    def method(self: TracedInt, *args: Any) -> Any:
        self.touched = True
        return getattr(int, name)(self, *args)

    return method


BINARY = "add sub mul truediv floordiv mod divmod pow lshift rshift and or xor"
OTHERS = "lt le gt ge eq ne neg pos abs invert bool int float index hash round trunc floor ceil str repr format"
for operation in (*BINARY.split(), *(f"r{name}" for name in BINARY.split()), *OTHERS.split()):
    setattr(TracedInt, f"__{operation}__", watch(f"__{operation}__"))
