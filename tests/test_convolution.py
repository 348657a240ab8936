"""Convolution with weights of each task: both ways are torch's own convolution, differentiable to second order."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from mlframework.backend.operators import TRACED, UNFOLDED, named
from mlframework.base_layers import Conv4, convolution
from mlframework.base_layers.conv4 import compared
from mlframework.base_layers.convolution import METHODS, Convolution, Shape, method_for
from mlframework.episode import Episode
from mlframework.inner_loop import SGD
from mlframework.meta_layers.gradient_descent import MAML, Exact
from mlframework.tasks import ArrayTasks, ClassIndexed
from mlframework.training.meta_gradient import meta_gradient

#: Image, channels in and out, kernel, stride, padding: even and odd sizes, unequal sides, pixels no kernel reaches.
CASES = [
    ((7, 6), 2, 3, (3, 3), (2, 2), (1, 1)),
    ((6, 6), 2, 3, (3, 3), (1, 1), (1, 1)),
    ((5, 8), 1, 2, (2, 3), (2, 1), (0, 2)),
    ((4, 4), 2, 2, (1, 1), (3, 3), (0, 0)),
    ((9, 9), 1, 1, (3, 3), (4, 4), (1, 1)),
]


def random(*size):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("image", "inputs", "outputs", "kernel", "stride", "padding"), CASES)
def test_each_way_is_torchs_convolution_and_twice_differentiable(
    method, image, inputs, outputs, kernel, stride, padding
):
    def convolve(x, weight):
        return METHODS[method](x, weight, stride, padding)

    x, weight = random(3, inputs, *image), random(outputs, inputs, *kernel)
    torch.testing.assert_close(convolve(x, weight), F.conv2d(x, weight, None, stride, padding))
    assert gradcheck(convolve, (x, weight))
    assert gradgradcheck(convolve, (x, weight), fast_mode=True)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_over_tasks_each_way_is_a_loop_over_them(method, in_dims):
    def convolve(x, weight):
        return METHODS[method](x, weight, (2, 2), (1, 1))

    x = random(2, 3, 2, 5, 5) if in_dims[0] == 0 else random(3, 2, 5, 5)
    weight = random(2, 4, 2, 3, 3) if in_dims[1] == 0 else random(4, 2, 3, 3)
    vectorised = torch.func.vmap(convolve, in_dims)
    loop = torch.stack(
        [
            convolve(*(t[task] if dim == 0 else t for t, dim in zip((x, weight), in_dims, strict=True)))
            for task in (0, 1)
        ]
    )
    torch.testing.assert_close(vectorised(x, weight), loop)
    assert gradgradcheck(vectorised, (x, weight), fast_mode=True)


@pytest.mark.parametrize("tasks", [(), (2,)])
@pytest.mark.parametrize(("image", "inputs", "outputs", "kernel", "stride", "padding"), CASES)
def test_what_is_traced_is_what_the_operators_do(tasks, image, inputs, outputs, kernel, stride, padding):
    x, weight = random(*tasks, 3, inputs, *image).detach(), random(*tasks, outputs, inputs, *kernel).detach()
    convolve, by_input, by_weight = (named(name) for name in UNFOLDED)
    y = convolve(x, weight, stride, padding)
    for operator, *args in (
        (convolve, x, weight, stride, padding),
        (by_input, y, weight, image, stride, padding),
        (by_weight, y, x, kernel, stride, padding),
    ):
        torch.testing.assert_close(TRACED[operator.default](*args), operator(*args))


@pytest.mark.parametrize("settings", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "reflect"}])
def test_what_is_not_plain_is_left_to_torch(settings):
    ours, theirs = (kind(2, 4, 3, **{"padding": 1, **settings}) for kind in (Convolution, nn.Conv2d))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_torch_func_takes_it():
    layer, x = Convolution(1, 2, 3).double(), random(2, 1, 4, 4)
    ours = torch.func.grad(lambda x: layer(x).square().sum())(x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(ours, expected)


LARGE = Shape(tasks=1, in_channels=16, products=10**8, device="cpu")


def test_the_method_follows_from_the_shape():
    small, tasks = LARGE._replace(products=10**5), LARGE._replace(tasks=2)
    assert method_for(LARGE) == method_for(small) == "torch"
    assert method_for(tasks) == "native"
    assert method_for(tasks._replace(products=10**5)) == method_for(tasks._replace(in_channels=1)) == "unfolded"
    assert method_for(small, compiled=True) == "unfolded"
    assert method_for(tasks._replace(device="cuda")) == "torch"


def test_a_convolution_can_be_exported():
    layer, x = Convolution(16, 32, 3), torch.randn(8, 16, 32, 32)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_a_convolution_can_be_traced_with_sizes_that_stand_for_others():
    layer, x = Convolution(16, 32, 3), torch.randn(8, 16, 32, 32)
    traced = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(traced(x), layer(x))


def test_a_shape_knows_the_tasks_behind_vmap():
    shapes = []

    def see(x, weight):
        shapes.append(Shape.of(x, weight, (1, 1), (0, 0)))
        return x

    x, weight = torch.zeros(3, 5, 2, 4, 4, requires_grad=True), torch.zeros(3, 6, 2, 3, 3)
    torch.func.vmap(see)(x, weight)
    torch.func.vmap(lambda x: see(x, weight[0]))(x)
    assert [(shape.tasks, shape.products) for shape in shapes] == [(3, 5 * 4 * 108), (1, 15 * 4 * 108)]


def test_weights_that_tasks_share_are_those_of_one_task(monkeypatch):
    asked = []
    monkeypatch.setattr(convolution, "method_for", lambda shape, compiled: asked.append(shape) or "unfolded")
    layer, x = Convolution(2, 3, 3), torch.zeros(4, 5, 2, 6, 6)
    torch.func.vmap(layer)(x)
    weights = {name: p.expand(4, *p.shape) for name, p in layer.named_parameters()}
    torch.func.vmap(lambda weights, x: torch.func.functional_call(layer, weights, x))(weights, x)
    assert [shape.tasks for shape in asked] == [1, 4]
    assert asked[0].products == 4 * asked[1].products


@pytest.mark.parametrize("size", [4, 7])
def test_pooling_that_is_compiled_gives_the_first_of_equal_pixels_the_gradient(size):
    x = torch.randint(3, (2, 3, size, size)).double().requires_grad_()
    ours, theirs = compared(x), F.max_pool2d(x, 2)
    torch.testing.assert_close(ours, theirs)
    cotangent = random(*theirs.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in (ours, theirs)))
    assert compared(torch.full((1, 1, 2, 2), torch.nan)).isnan().all()


@pytest.mark.parametrize("downsample", ["stride", "pool"])
@pytest.mark.parametrize("engine", ["vectorised", "loop"])
def test_channels_last_images_give_the_meta_gradient_of_contiguous_ones(engine, downsample, float64):
    """Layouts differ in rounding alone, which inner steps through the norm of two images magnify."""
    x, y = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(40) // 5
    task = ArrayTasks({"train": ClassIndexed.from_labels(x, y)}, n_way=2, k_shot=2, k_query=2)
    network = Conv4(task.spec, filters=6, downsample=downsample)
    layer = MAML(network, task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2)
    layer.engine = engine
    support, query = task.sample(3, "train", torch.Generator().manual_seed(0))
    found = []
    for change in (torch.Tensor.contiguous, lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3)):
        losses, _ = meta_gradient(
            layer, Episode(support._replace(x=change(support.x)), query._replace(x=change(query.x)))
        )
        found.append((losses, [p.grad for p in layer.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
