"""Batch statistics by torch's own kernels: the layer written from mean and variance, to every order and over tasks."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from mlframework.backend.normalise import normalise
from mlframework.backend.operators import ONCE, TRACED, differentiated
from mlframework.base_layers import BatchStatistics, normalisation
from mlframework.inner_loop import SGD
from mlframework.inner_loop.inner_loop import inner_loop

pytestmark = pytest.mark.usefixtures("float64")

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


def random(*size):
    return torch.randn(size).requires_grad_()


def images(*leading, layout):
    """Images `[..., 4, 3, 2, 5]` with channels last in memory, or not."""
    x = torch.randn(*leading, 4, 2, 5, 3).movedim(-1, -3)
    return (x if layout == LAST else x.contiguous()).requires_grad_()


def native(x, weight, bias):
    return normalise(x, weight, bias, 1e-5)


def operator(x, weight, bias):
    """What `vmap` and compilers see."""
    return torch.ops.mlframework.normalise(x, weight, bias, 1e-5)[0]


def plain(x, weight, bias):
    """What the operator stands for."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    inverse = torch.rsqrt(centred.square().mean((0, 2, 3), keepdim=True) + 1e-5)
    return centred * inverse * weight[:, None, None] + bias[:, None, None]


def derivatives(function, inputs, order):
    """Gradients of functions of gradients, to an order."""
    torch.manual_seed(1)
    found = [function(*inputs)]
    for _ in range(order):
        total = sum((y.sin() * torch.randn_like(y, memory_format=CONTIGUOUS)).sum() for y in found)
        found = torch.autograd.grad(total, inputs, create_graph=True)
    return found


@pytest.mark.parametrize("native", [native, operator])
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_the_operator_is_what_it_stands_for_to_third_order(layout, native):
    inputs = images(layout=layout), random(3), random(3)
    assert native(*inputs).stride() == inputs[0].stride()
    for order in range(4):
        torch.testing.assert_close(derivatives(native, inputs, order), derivatives(plain, inputs, order))
    assert gradcheck(native, inputs)
    assert gradgradcheck(native, inputs)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, None), (None, 0, 0)])
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_over_tasks_the_operator_is_what_it_stands_for(in_dims, layout):
    x = images(*([] if in_dims[0] is None else [2]), layout=layout)
    x = (x.transpose(0, 1) if in_dims[0] == 1 else x).detach().requires_grad_()
    inputs = x, *(random(3) if dim is None else random(2, 3) for dim in in_dims[1:])
    ours, expected = (torch.func.vmap(function, in_dims) for function in (native, plain))
    for order in range(3):
        torch.testing.assert_close(derivatives(ours, inputs, order), derivatives(expected, inputs, order))
    assert gradgradcheck(ours, inputs, fast_mode=True)


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_what_is_traced_is_what_the_operators_do(leading, layout):
    ops = torch.ops.mlframework
    x, grad, cotangent = (images(*leading, layout=layout).detach() for _ in range(3))
    weight, bias, p, q = torch.randn(4, *leading, 3)
    _, *statistics = ops.normalise(x, weight, bias, 1e-5)
    _, *sums = ops.normalise_backward(grad, x, weight, *statistics, 1e-5)
    for operator, *args in (
        (ops.normalise, x, weight, bias, 1e-5),
        (ops.normalise_backward, grad, x, weight, *statistics, 1e-5),
        (ops.normalise_twice, cotangent, p, q, grad, x, weight, *statistics, *sums),
    ):
        torch.testing.assert_close(TRACED[operator.default](*args), operator(*args))


def test_over_tasks_channels_stay_last_in_memory():
    x, weight = images(2, layout=LAST), random(3)
    y = torch.func.vmap(native, (0, None, None))(x, weight, weight)
    (by_x,) = torch.autograd.grad(y.square().sum(), x)
    assert y.stride() == by_x.stride() == x.stride()


@pytest.mark.parametrize("native", [native, operator])
def test_gradients_may_come_in_any_layout_or_be_vmapped(native):
    x, weight = images(layout=LAST), random(3)
    y, cotangents = native(x, weight, weight), torch.randn(2, *x.shape)
    (together,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    torch.testing.assert_close(together, torch.stack(one_by_one))


@pytest.mark.parametrize("native", [native, operator])
def test_vmapped_gradients_can_be_differentiated_again(native):
    inputs, cotangents = (images(layout=LAST), random(3), random(3)), torch.randn(2, 4, 3, 2, 5)
    found = []
    for function in (native, plain):
        grads = torch.autograd.grad(function(*inputs), inputs, cotangents, is_grads_batched=True, create_graph=True)
        by_inputs = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), inputs, allow_unused=True)
        found.append((*grads, *by_inputs[:2]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 6), (8, 3, 2, 3, 2)])
def test_the_layer_is_torchs_batch_norm_either_way(monkeypatch, shape, large):
    for name in ("LARGE", "SMALL"):
        monkeypatch.setattr(normalisation, name, large)
    layer, x = BatchStatistics(3), random(*shape)
    nn.init.uniform_(layer.weight, 0.5, 2)
    expected = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    torch.testing.assert_close(layer(x), expected)
    assert gradgradcheck(layer, x, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, in jacfwd
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp, torch.func.jacfwd])
def test_torch_func_takes_large_inputs(monkeypatch, transform):
    monkeypatch.setattr(normalisation, "LARGE", 0)
    monkeypatch.setattr(normalisation, "SMALL", 0)
    layer, x = BatchStatistics(3), images(layout=LAST).detach()

    def loss(x):
        return layer(x).sin().sum()

    def loss_of(bias):
        return torch.func.functional_call(layer, {"bias": bias}, (x,)).sin().sum()

    torch.testing.assert_close(torch.func.grad(loss_of)(layer.bias), torch.autograd.grad(loss(x), layer.bias)[0])

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    found = transform(loss, x)[1](torch.tensor(1.0))[0] if transform is torch.func.vjp else transform(loss)(x)
    torch.testing.assert_close(found, expected)


def test_single_precision_is_as_exact_as_mean_and_variance(monkeypatch):
    x, exact = images(layout=LAST).detach(), BatchStatistics(3)
    results = []
    for small in (0, 10**9):
        monkeypatch.setattr(normalisation, "SMALL", small)
        results.append(BatchStatistics(3).float()(x.float()).double())
    for result in results:  # some units of the last place
        torch.testing.assert_close(result, exact(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_once_differentiated_the_gradients_are_the_same(layout):
    inputs = (images(layout=layout), random(3), random(3))
    with differentiated(once=True):
        y = native(*inputs)
    assert type(y.grad_fn).__name__ == "NativeBatchNormBackward0"
    assert type(native(*inputs).grad_fn).__name__ == "NormaliseBackward"
    cotangent = torch.randn_like(y)
    for found, expected in zip(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(plain(*inputs), inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("detached_steps", "expected"), [(0, [False, False]), (1, [True, False]), (2, [True, True])])
def test_an_inner_loop_tells_which_of_its_gradients_are_constants(detached_steps, expected):
    told = []

    def losses_of(params, step):
        told.append(ONCE.get())
        return params["w"].square().sum(1)

    w = {"w": torch.ones(2, 3, requires_grad=True)}
    list(inner_loop(losses_of, w, SGD(w, lr=0.1), 2, detached_steps=detached_steps))
    assert told == expected
    with torch.no_grad():
        list(inner_loop(losses_of, w, SGD(w, lr=0.1), 1))
    assert told[-1]
    assert not ONCE.get()
