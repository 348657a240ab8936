"""Batch statistics of stacked tasks, eager and as compilers trace them: the layer, task by task, to every order."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from mlframework.backend.normalise import normalise
from mlframework.backend.tracing import while_traced
from mlframework.base_layers import BatchStatistics

pytestmark = pytest.mark.usefixtures("float64")

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


def random(*size):
    return torch.randn(size).requires_grad_()


def images(*leading, layout):
    """Images `[*leading, 4, 3, 2, 5]` with channels last in memory, or not."""
    x = torch.randn(*leading, 4, 2, 5, 3).movedim(-1, -3)
    return (x if layout == LAST else x.contiguous()).requires_grad_()


def eager(x, weight, bias):
    return normalise(x, weight, bias, 1e-5)


def traced(x, weight, bias):
    with while_traced():
        return normalise(x, weight, bias, 1e-5)


def task_by_task(x, weight, bias):
    layer = BatchStatistics(3)
    tasks = zip(x, weight, bias, strict=True)
    return torch.stack([torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)) for x, w, b in tasks])


def derivatives(function, inputs, order):
    """Gradients of functions of gradients, to an order."""
    torch.manual_seed(1)
    found = [function(*inputs)]
    for _ in range(order):
        total = sum((y.sin() * torch.randn_like(y, memory_format=CONTIGUOUS)).sum() for y in found)
        found = torch.autograd.grad(total, inputs, create_graph=True)
    return found


both = pytest.mark.parametrize("stacked", [eager, traced])


@both
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_stacked_tasks_are_normalised_as_one_after_another_to_third_order(layout, stacked):
    inputs = images(2, layout=layout), random(2, 3), random(2, 3)
    for order in range(4):
        torch.testing.assert_close(derivatives(stacked, inputs, order), derivatives(task_by_task, inputs, order))
    assert gradcheck(stacked, inputs)
    assert gradgradcheck(stacked, inputs)


@both
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 6), (8, 3, 2, 3, 2)])
def test_it_is_torchs_batch_norm_in_any_number_of_dimensions(shape, stacked):
    x, weight, bias = random(2, *shape), random(2, 3), random(2, 3)
    expected = [
        nn.functional.batch_norm(*task, training=True)
        for task in zip(x, [None] * 2, [None] * 2, weight, bias, strict=False)
    ]
    torch.testing.assert_close(stacked(x, weight, bias), torch.stack(expected))
    torch.testing.assert_close(task_by_task(x, weight, bias), torch.stack(expected))


def test_a_graph_of_the_second_derivative_is_made_of_formulas():
    inputs = [t.detach() for t in (images(2, layout=LAST), random(2, 3), random(2, 3))]

    def second(*inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        return [t.detach() for t in derivatives(eager, inputs, 2)]

    with while_traced():
        graph = make_fx(second, tracing_mode="fake")(*inputs)
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    found, expected = graph(*inputs), second(*inputs)
    torch.testing.assert_close(found, expected)


@both
def test_gradients_may_come_in_any_layout_or_be_vmapped(stacked):
    x, weight = images(2, layout=LAST), random(2, 3)
    y, cotangents = stacked(x, weight, weight), torch.randn(2, *x.shape)
    (together,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    torch.testing.assert_close(together, torch.stack(one_by_one))


@both
def test_vmapped_gradients_can_be_differentiated_again(stacked):
    inputs, cotangents = (images(2, layout=LAST), random(2, 3), random(2, 3)), torch.randn(2, 2, 4, 3, 2, 5)
    found = []
    for function in (stacked, task_by_task):
        grads = torch.autograd.grad(function(*inputs), inputs, cotangents, is_grads_batched=True, create_graph=True)
        by_inputs = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), inputs, allow_unused=True)
        found.append((*grads, *by_inputs[:2]))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, in jacfwd
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp, torch.func.jacfwd])
def test_torch_func_takes_the_layer(transform):
    layer, x = BatchStatistics(3), images(layout=LAST).detach()

    def loss(x):
        return layer(x).sin().sum()

    def loss_of(bias):
        return torch.func.functional_call(layer, {"bias": bias}, (x,)).sin().sum()

    torch.testing.assert_close(torch.func.grad(loss_of)(layer.bias), torch.autograd.grad(loss(x), layer.bias)[0])

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    found = transform(loss, x)[1](torch.tensor(1.0))[0] if transform is torch.func.vjp else transform(loss)(x)
    torch.testing.assert_close(found, expected)


def test_torch_func_takes_stacked_tasks():
    x, weight, bias = images(2, layout=LAST).detach(), random(2, 3), random(2, 3)
    found = torch.func.grad(lambda x: eager(x, weight, bias).sin().sum())(x)
    expected = torch.func.grad(lambda x: task_by_task(x, weight, bias).sin().sum())(x)
    torch.testing.assert_close(found, expected)


@both
def test_single_precision_is_as_exact_as_mean_and_variance(stacked):
    inputs = images(2, layout=LAST), random(2, 3), random(2, 3)

    def second(function, inputs):
        grads = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        return [g.double() for g in torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs)]

    single = second(stacked, [t.detach().float().requires_grad_() for t in inputs])
    for found, exact in zip(single, second(task_by_task, inputs), strict=True):  # some units of the last place
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
