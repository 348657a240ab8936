"""Convolution of stacked tasks: torch's own, task by task, eager and as compilers trace it, to every order."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from mlframework.backend.convolve import convolve, max_pool
from mlframework.backend.tracing import while_traced
from mlframework.base_layers import Conv4
from mlframework.episode import Episode
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
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


def traced(*tensors, stride, padding):
    with while_traced():
        return convolve(*tensors, stride=stride, padding=padding)


def traced_as_large(*tensors, stride, padding):
    """As `traced`, by the way of convolutions that are too large to be unfolded."""
    with mock.patch("mlframework.backend.convolve.pays_unfolded", return_value=False):
        return traced(*tensors, stride=stride, padding=padding)


def task_by_task(x, weight, bias, stride, padding):
    """Convolutions by torch, of weights and biases that are a task's own or shared."""
    own = [t.expand(len(x), *t.shape[-dims:]) for t, dims in ((weight, 4), (bias, 1))]
    return torch.stack([F.conv2d(*task, stride, padding) for task in zip(x, *own, strict=True)])


each_way = pytest.mark.parametrize("stacked", [convolve, traced, traced_as_large])


@each_way
@pytest.mark.parametrize(("image", "inputs", "outputs", "kernel", "stride", "padding"), CASES)
def test_tasks_are_convolved_as_one_after_another_and_twice_differentiable(
    stacked, image, inputs, outputs, kernel, stride, padding
):
    tensors = random(2, 3, inputs, *image), random(2, outputs, inputs, *kernel), random(2, outputs)
    function = partial(stacked, stride=stride, padding=padding)
    torch.testing.assert_close(function(*tensors), task_by_task(*tensors, stride, padding))
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors, fast_mode=True)


@each_way
@pytest.mark.parametrize(("own_weight", "own_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_weights_and_biases_may_be_shared(stacked, own_weight, own_bias):
    x, weight, bias = random(2, 3, 2, 5, 5), random(2, 4, 2, 3, 3), random(2, 4)
    tensors = x, weight if own_weight else random(4, 2, 3, 3), bias if own_bias else random(4)
    function = partial(stacked, stride=(2, 2), padding=(1, 1))
    torch.testing.assert_close(function(*tensors), task_by_task(*tensors, (2, 2), (1, 1)))
    torch.testing.assert_close(
        function(x, weight, None), task_by_task(x, weight, torch.zeros(4).double(), (2, 2), (1, 1))
    )
    assert gradgradcheck(function, tensors, fast_mode=True)


@each_way
def test_third_derivatives_are_exact(stacked):
    x, weight, bias = random(2, 2, 1, 4, 4), random(2, 2, 1, 3, 3), random(2, 2)

    def once(x, weight):
        y = stacked(x, weight, bias, stride=(1, 1), padding=(1, 1))
        return torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)

    assert gradgradcheck(once, (x, weight), fast_mode=True)


def test_what_is_small_is_traced_as_products_and_what_is_large_as_torchs_convolution():
    def targets(images):
        with while_traced():
            graph = make_fx(partial(convolve, stride=(1, 1), padding=(1, 1)))(
                torch.ones(2, images, 16, 8, 8), torch.ones(2, 16, 16, 3, 3), torch.ones(2, 16)
            )
        return {str(node.target) for node in graph.graph.nodes}

    assert "aten.bmm.default" in targets(1)
    assert "aten.convolution.default" in targets(1000)


@pytest.mark.parametrize("size", [4, 7])
def test_pooling_that_is_compiled_gives_the_first_of_equal_pixels_the_gradient(size):
    x = torch.randint(3, (2, 3, size, size)).double().requires_grad_()
    ours, theirs = max_pool(x), F.max_pool2d(x, 2)
    torch.testing.assert_close(ours, theirs)
    cotangent = random(*theirs.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in (ours, theirs)))
    assert max_pool(torch.full((1, 1, 2, 2), torch.nan)).isnan().all()


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
