"""What a traced step is turned into before it is compiled: the same numbers, by operations that are faster.

`merge_products`: a traced step holds `bmm`, a product of matrices for each task. Where all tasks share the right
factor, as the weights before the first inner step, their left factors are one tall matrix; where only the sum over
tasks is wanted, as for the gradient of shared weights, it is one product over the examples of all tasks. Products with
a vector are left alone: inductor makes loops of them, together with what is around them.

`lay_out`: images with channels last have their axes in another order than their memory. What inductor fuses it lays
out anew, and the next to read it goes through it crosswise. So such operations are done on axes in memory's order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from mlframework.backend.private import UNSAFE_VIEW

__all__ = ["lay_out", "memory_order", "merge_products", "sink"]

aten = torch.ops.aten

MULTIPLIED = (aten.mul.Scalar, aten.mul.Tensor)
VIEWS = (aten.view.default, UNSAFE_VIEW)
LINEAR = (aten.add.Tensor, *MULTIPLIED, aten.clone.default, aten.permute.default, aten.expand.default, *VIEWS)

#: Of copies; all others are of four axes or five.
FORMATS = (None, torch.contiguous_format, torch.preserve_format)


def merge_products(graph: fx.Graph) -> None:
    """Rewrites a graph of the operations that inductor knows, whose nodes have their fake tensors."""
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        share_factor(graph, node)
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        sum_inside(graph, node)
    graph.eliminate_dead_code()


def share_factor(graph: fx.Graph, node: fx.Node) -> None:
    """A product whose right factor is the same for all tasks becomes one of all tasks' rows with it."""
    left, right = factors(node)
    (tasks, n, k), m = value(left).shape, value(right).shape[2]
    if tasks == 1 or 1 in (k, m) or not stacks(value(left)) or not is_shared(right):
        return
    with graph.inserting_before(node):
        rows = call(graph, aten.view.default, left, [tasks * n, k])
        product = call(graph, aten.mm.default, rows, shared_by_all(graph, right))
        replace(graph, node, call(graph, aten.view.default, product, [tasks, n, m]))


def is_shared(node: fx.Node) -> bool:
    """Whether it is the same for all tasks `[tasks, ...]`, and known to be so."""
    return value(node).stride(0) == 0 or (len(parts := parts_of(node)) == 1 and is_shared(parts[0]))


def shared_by_all(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What is the same for all tasks, once."""
    if value(node).stride(0) == 0:
        return call(graph, aten.select.int, node, 0, 0)
    return without_tasks(graph, node, [shared_by_all(graph, part) for part in parts_of(node)])


def sum_inside(graph: fx.Graph, node: fx.Node) -> None:
    """A sum over tasks of products, and of what is made of products, becomes products over the examples of all."""
    summed, axes, keep, *_ = *node.args, False
    assert isinstance(summed, fx.Node)
    if axes != [0] or node.kwargs or value(summed).shape[:1] in ((), (1,)) or not holds_products(summed):
        return
    with graph.inserting_before(node):
        total = sum_of(graph, summed)
        replace(graph, node, call(graph, aten.unsqueeze.default, total, 0) if keep else total)


def replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    """Puts a node in another's place, laid out in memory as that one, which is contiguous, was."""
    if not value(by).is_contiguous():
        by = call(graph, aten.clone.default, by, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(by)


def holds_products(node: fx.Node) -> bool:
    """Whether `sum_of` finds a product of which only the sum is wanted."""
    return len(node.users) == 1 and (is_summable(node) or any(map(holds_products, parts_of(node))))


def is_summable(node: fx.Node) -> bool:
    """Whether it is a product whose factors lie in memory as if all examples were one task's."""
    if node.target is not aten.bmm.default:
        return False
    left, right = map(value, factors(node))
    return 1 not in (left.shape[1], right.shape[2]) and stacks(left.mT) and stacks(right)


def sum_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The sum over tasks of a node `[tasks, ...]`."""
    if not holds_products(node):
        return call(graph, aten.sum.dim_IntList, node, [0])
    if not is_summable(node):
        return without_tasks(graph, node, [sum_of(graph, part) for part in parts_of(node)])
    left, right = factors(node)
    (tasks, n, k), m = value(left).shape, value(right).shape[2]
    columns = call(graph, aten.view.default, call(graph, aten.permute.default, left, [0, 2, 1]), [tasks * k, n])
    rows = call(graph, aten.view.default, right, [tasks * k, m])
    return call(graph, aten.mm.default, call(graph, aten.permute.default, columns, [1, 0]), rows)


def parts_of(node: fx.Node) -> list[fx.Node]:
    """The tensors `[tasks, ...]` that a node is made of, task by task and linearly; none where it is made otherwise."""
    return [] if arguments_per_task(node) is None else node.all_input_nodes


def arguments_per_task(node: fx.Node) -> list[Any] | None:
    """For an operation that is linear and takes each task's numbers alone: its arguments for one task, but tensors."""
    target, parts, args = node.target, node.all_input_nodes, cast("Any", node.args)
    if target not in LINEAR:
        return None
    shape = value(node).shape
    if any(value(part).shape[:1] != shape[:1] for part in parts):
        return None
    if target is aten.add.Tensor and len(parts) == 2 and value(parts[0]).shape == value(parts[1]).shape:
        return []
    if target in MULTIPLIED and isinstance(args[1], int | float):
        return [args[1]]
    if target is aten.clone.default and node.kwargs.get("memory_format") in FORMATS:
        return []
    if target is aten.permute.default and args[1][0] == 0:
        return [[axis % len(shape) - 1 for axis in args[1][1:]]]
    kept = target in VIEWS and len(shape) > 1
    if kept or (target is aten.expand.default and value(parts[0]).dim() == len(shape)):
        return [list(shape[1:])]
    return None


def without_tasks(graph: fx.Graph, node: fx.Node, parts: list[fx.Node]) -> fx.Node:
    """A node's operation on parts that have no axis of tasks."""
    # What was a view may have to be copied.
    target: Any = aten.reshape.default if node.target in VIEWS else node.target
    return call(graph, target, *parts, *(arguments_per_task(node) or []), **node.kwargs)


def lay_out(graph: fx.Graph) -> None:
    """Lets elementwise operations whose results do not lie in the order of their axes go through them as they lie."""
    for node in list(graph.nodes):
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) and isinstance(node.meta["val"], Tensor):
            permute_axes(graph, node)
    graph.eliminate_dead_code()


def sink(graph: fx.Graph) -> None:
    """Puts every operation before the first that reads its result, unless that is a result of the graph.

    A second gradient begins with products of all layers, which would long have left the processor's cache when read.
    """
    (output,) = graph.find_nodes(op="output")
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and node.users and output not in node.users:
            min(node.users).prepend(node)


def permute_axes(graph: fx.Graph, node: fx.Node) -> None:
    """Makes an operation's first axis the one with the longest stride, and so on, and permutes the result back."""
    x, parts = value(node), node.all_input_nodes
    order, back = memory_order(x)
    if x.is_contiguous() or not x.permute(order).is_contiguous():
        return
    if any(value(part).dim() not in (0, x.dim()) for part in parts):
        return
    with graph.inserting_before(node):
        permuted = {p: call(graph, aten.permute.default, p, order) if value(p).dim() else p for p in parts}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), permuted.__getitem__)
        if "memory_format" in kwargs:  # copies may say how they lie, in terms of their axes
            kwargs = {**kwargs, "memory_format": torch.contiguous_format}
        node.replace_all_uses_with(call(graph, aten.permute.default, call(graph, node.target, *args, **kwargs), back))


def memory_order(x: Tensor) -> tuple[list[int], list[int]]:
    """Axes from the longest stride to the shortest, and the permutation that undoes this one."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return order, [order.index(axis) for axis in range(x.dim())]


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The factors `[tasks, n, k]` and `[tasks, k, m]` of a product."""
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right


def value(node: fx.Node) -> Tensor:
    return node.meta["val"]


def stacks(x: Tensor) -> bool:
    """Whether `[tasks, n, m]` is `[tasks * n, m]` without a copy."""
    return x.stride(0) == x.shape[1] * x.stride(1)


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node that knows its fake tensor."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args), **kwargs)
    return node
