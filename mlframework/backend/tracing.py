"""Functions of tensors as graphs, and what a graph refuses.

`make_fx` traces through the gradients that an inner loop takes, which `torch.compile` does not. Parameters and buffers
of the meta layer are inputs of a graph, not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from mlframework.backend.algorithm import Algorithm
from mlframework.backend.private import WITH_CONSTANTS, decompositions, is_mutable

__all__ = [
    *("LATER", "NotCapturable", "TracedInt", "changes_with_step", "is_same", "is_traced"),
    *("traced", "tracing", "while_traced"),
]

#: Outer steps ahead at which a graph has to be the same.
LATER = 1000

#: A rectifier's gradient without comparisons: inductor takes the ends of rows with comparisons one number at a time.
RECTIFIER = {torch.ops.aten.threshold_backward.default: lambda grad, x, t: grad * (x - t if t else x).relu().sign()}

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
        graph = make_fx(function, {**decompositions(), **RECTIFIER}, **settings)(*inputs)
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


def is_same(graph: fx.GraphModule, later: fx.GraphModule, meta_layer: Algorithm) -> bool:
    """Whether a graph and one that was traced later do the same, with the same constants.

    Raises:
        NotCapturable: it draws random numbers, or holds a tensor as a constant that is not the task's.
    """
    who = type(meta_layer).__name__
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotCapturable(f"{who} draws random numbers ({node.target})")
    task = getattr(meta_layer, "task", None)
    owners = [task, *getattr(task, "__dict__", {}).values()]
    owned = {id(x) for owner in owners for x in (*vars(type(owner)).values(), *getattr(owner, "__dict__", {}).values())}
    names = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    for name in names:
        constant: Tensor = getattr(graph, name)  # one that the step makes itself is another each time
        if constant is getattr(later, name, None) and id(constant) not in owned:
            what = f"{who} reads a tensor {tuple(constant.shape)} that is neither parameter nor buffer"
            raise NotCapturable(f"{what}: a compiled step would keep its value; register it as a buffer")
    return graph.code == later.code and all(torch.equal(getattr(graph, name), getattr(later, name)) for name in names)


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
