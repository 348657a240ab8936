"""What traced steps are turned into gives what they gave."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.graph_passes import lay_out, merge_products, sink
from mlframework.backend.tracing import traced
from mlframework.base_layers import MLP
from mlframework.episode import Episode, Examples
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid

TASKS, EXAMPLES, IN, OUT = 4, 6, 5, 3


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, G = data(TASKS, EXAMPLES, IN), data(TASKS, EXAMPLES, OUT, seed=1)
W = data(OUT, IN, seed=2)


def merged(function, *inputs):
    """What is left of products by name, in a graph that gives what it did before."""
    graph = traced(function, inputs)
    merge_products(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
    named = (getattr(node.target, "__name__", "").split(".")[0] for node in graph.graph.nodes)
    return Counter(name for name in named if name in ("bmm", "mm", "sum"))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w.expand(TASKS, OUT, IN).mT,
        lambda x, w: torch.bmm(x, w.mT.contiguous().expand(TASKS, IN, OUT)),
        lambda x, w: torch.bmm(x, w.expand(TASKS, OUT, IN).mT.contiguous()),
        lambda x, w: torch.bmm(x, w.mT.expand(TASKS, IN, OUT).clone().view(TASKS, IN, OUT)),
        lambda x, w: torch.bmm(x, (2 * w).expand(TASKS, OUT, IN).permute(0, 2, 1)),
        lambda x, w: torch.bmm(x, w.view(OUT, 1, IN).expand(TASKS, OUT, 1, IN).reshape(TASKS, OUT, IN).mT),
    ],
)
def test_a_factor_that_all_tasks_share_meets_the_rows_of_all(function):
    assert merged(function, X, W) == {"mm": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.bmm(x[:, :4], w.mT.expand(TASKS, IN, OUT)),  # rows of tasks that do not lie evenly
        lambda x, w: torch.bmm(w.expand(TASKS, OUT, IN), x.mT),  # the left one is shared
        lambda x, w: torch.bmm(x, data(TASKS, 1, 1) * w.mT),
        lambda x, w: torch.bmm(x[:1], w.mT.expand(1, IN, OUT)),
        lambda x, w: torch.bmm(x, w[:1].mT.expand(TASKS, IN, 1)),  # a vector
    ],
)
def test_other_products_stay_one_for_each_task(function):
    assert merged(function, X, W) == {"bmm": 1}


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x, g: torch.bmm(g.mT, x).sum([0]), {"mm": 1}),
        (lambda x, g: torch.bmm(g.mT, x).sum([0], keepdim=True), {"mm": 1}),
        (lambda x, g: torch.bmm(g.mT, x).mT.sum([0]), {"mm": 1}),
        (lambda x, g: torch.bmm(g.mT, x).view(TASKS, -1).sum([0]), {"mm": 1}),
        (lambda x, g: torch.bmm(g.mT, x).permute(0, 2, 1).sum([0]), {"mm": 1}),
        (lambda x, g: (torch.bmm(g.mT, x) + torch.bmm(x.mT, g).mT).sum([0]), {"mm": 2}),
        (lambda x, g: (torch.mul(torch.bmm(g.mT, x), -0.1) + x[:, :OUT]).sum([0]), {"mm": 1, "sum": 1}),
        (lambda x, g: torch.add(x[:, :OUT], torch.bmm(g.mT, x), alpha=-0.1).sum([0]), {"mm": 1, "sum": 1}),
        (lambda x, g: (x[:, :OUT] + x[:, :OUT].square()).sum([0]), {"sum": 1}),
        (lambda x, g: torch.bmm(g.mT, x).square().sum([0]), {"bmm": 1, "sum": 1}),
        (lambda x, g: torch.bmm(g.mT, x).sum([1]), {"bmm": 1, "sum": 1}),
        (lambda x, g: torch.bmm(g[:, :4].mT, x[:, :4]).sum([0]), {"bmm": 1, "sum": 1}),
        (lambda x, g: torch.bmm(g[..., :1].mT, x).sum([0]), {"bmm": 1, "sum": 1}),
    ],
)
def test_a_sum_over_tasks_of_products_is_a_product_over_their_examples(function, left):
    assert merged(function, X, G) == left


def test_a_product_that_is_needed_task_by_task_is_not_computed_twice():
    def function(x, g):
        product = torch.bmm(g.mT, x)
        return product.square(), (product + torch.bmm(g.square().mT, x)).sum([0])

    assert merged(function, X, G) == {"bmm": 1, "sum": 1, "mm": 1}


def test_a_meta_gradient_has_products_of_both_kinds():
    task = Sinusoid(k_shot=3, k_query=3)
    layer = MAML(MLP(task.spec, hidden=[8, 8]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)
    layer = layer.double()
    support, query = task.sample(4, "train", torch.Generator().manual_seed(0)).to(torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def step(sx, sy, qx, qy, *parameters):
        episode = Episode(Examples(sx, sy, support.mask), Examples(qx, qy, query.mask))
        held = dict(zip(names, (p.detach().requires_grad_() for p in parameters), strict=True))
        with torch.nn.utils.stateless._reparametrize_module(layer, held):
            return list(eager_gradients(layer, episode).by_name.values())

    found = merged(step, support.x, support.y, query.x, query.y, *(p.detach() for p in layer.parameters()))
    assert found["mm"] >= 4, "forward and backward of the first step, and two gradients of the hidden weights"


def test_a_sum_over_tasks_lies_in_memory_as_it_did():
    """Whoever takes it was told so, and fused optimizers do not look."""
    left, right = data(3, 4, 5), data(3, 4, 6)
    graph = traced(lambda left, right: [torch.bmm(left.mT, right).mT.sum(0)], (left, right))
    merge_products(graph.graph)
    graph.recompile()
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    (found,) = graph(left, right)
    torch.testing.assert_close(found, torch.bmm(left.mT, right).mT.sum(0))
    assert found.is_contiguous()


IMAGES = data(2, 5, 4, 3).permute(0, 3, 1, 2)


def elementwise(function, *inputs):
    """Of each elementwise operation, whether its result lies in the order of its axes; the graph gives what it did."""
    graph = traced(function, inputs)
    lay_out(graph.graph)
    graph.graph.lint()
    graph.recompile()
    found, expected = graph(*inputs), function(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.stride() == expected.stride()
    nodes = [node for node in graph.graph.nodes if torch.Tag.pointwise in getattr(node.target, "tags", ())]
    return [node.meta["val"].is_contiguous() for node in nodes]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu(),
        lambda x: (x * x[:1, :, :1, :1]).tanh() - x,
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x.relu().permute(0, 2, 3, 1).sin(),
        lambda x: torch.add(x, x.square(), alpha=-0.1),
        lambda x: x * x.sum(),
        lambda x: x.mul(2).contiguous().relu().contiguous(memory_format=torch.channels_last),
    ],
)
def test_elementwise_operations_go_through_memory_in_its_order(function):
    found = elementwise(function, IMAGES)
    assert found and all(found)


def test_what_has_parts_of_fewer_axes_stays():
    assert elementwise(lambda x: x * x[0, 0, 0], IMAGES) == [False]


def test_an_operation_waits_for_the_first_that_reads_it():
    def function(x):
        early, result = x.exp(), x.sin()
        return result, x.cos().tan() * early

    graph = traced(function, (X,))
    sink(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(X), [*function(X)], rtol=0, atol=0)
    names = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    assert names == ["sin", "cos", "tan", "exp", "mul"]


def test_a_compiled_rectifier_has_the_gradient_of_an_eager_one():
    def gradients(x):
        found = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (x.relu(), F.threshold(x, 0.5, -1.0))]
        return torch.stack(found)

    x = torch.tensor([-1.0, -0.0, 0.0, 0.25, 0.5, 2.0], requires_grad=True)
    expected = gradients(x)
    graph = traced(lambda x: gradients(x.detach().requires_grad_()), (x,))
    torch.testing.assert_close(graph(x.detach()), expected, rtol=0, atol=0)
