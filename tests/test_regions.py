"""A function that is compiled with its backward pass is the function, whatever it returns."""

import warnings
from functools import partial

import pytest
import torch

from mlframework.backend.graph_cache import GraphCache
from mlframework.backend.regions import NotCompiled, RegionCompiler
from mlframework.backend.tracing import NotCapturable
from mlframework.base_layers import MLP
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid

pytestmark = pytest.mark.slow  # every test compiles


@pytest.fixture
def layer():
    task = Sinusoid(k_shot=3, k_query=3)
    return MAML(MLP(task.spec, hidden=[4]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)


@pytest.fixture
def run(layer):
    kept = GraphCache()
    with kept.checked(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        yield RegionCompiler(layer, kept)


def same(run, function, *args, inputs):
    """Compares the tensors of a function's value, and their gradients, with those of the function itself."""
    found, expected = (gradients(way(function, *args), inputs) for way in (run, lambda f, *args: f(*args)))
    torch.testing.assert_close(found, expected)


def gradients(value, inputs):
    leaves = [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
    total = sum((x.cos() * torch.arange(x.numel()).view(x.shape)).sum() for x in leaves if x.requires_grad)
    return value, torch.autograd.grad(total, inputs, allow_unused=True)


def test_nests_of_tensors_numbers_words_and_nothing(run):
    x = torch.rand(3, requires_grad=True)
    same(run, lambda x: {"a": [x.sin(), 3, None], "b": (0.5, x.exp() * x)}, x, inputs=[x])
    assert run(with_a_word, x)[1] == "word"


def with_a_word(x):
    return x + 1, "word"


def test_equal_results_have_gradients_of_their_own(run):
    x = torch.rand(3, requires_grad=True)
    same(run, lambda x: (x.sin() * 2, x.sin() * 2, x.sin()), x, inputs=[x])


def test_what_is_detached_has_no_gradient_and_leaves_the_others_theirs(run):
    x = torch.rand(3, requires_grad=True)

    def function(x):
        y = x.sin()
        return y, y.detach(), x.detach(), x.detach() * 1

    assert [leaf.requires_grad for leaf in run(function, x)] == [True, False, False, False]
    same(run, function, x, inputs=[x])


def test_a_tensor_that_is_an_input_or_comes_twice(run):
    x, y = torch.rand(2, 3, requires_grad=True).unbind()
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()

    def function(x, y):
        z = x * y
        return x, z, z, y.view(3, 1)

    same(run, function, x, y, inputs=[x, y])


def test_what_has_no_gradient_has_none(run):
    x = torch.rand(4, requires_grad=True)
    found = run(lambda x: (x.argmax(), x.detach() * 2, x.sum()), x)
    assert [leaf.requires_grad for leaf in found] == [False, False, True]
    same(run, lambda x: (x.argmax(), x.detach() * 2, x.sum()), x, inputs=[x])


def test_a_result_that_nobody_reads_has_a_gradient_of_zero(run):
    x = torch.rand(4, requires_grad=True)
    used, _ = run(lambda x: (x.sin(), x.cos()), x)
    (grad,) = torch.autograd.grad(used.sum(), x)
    torch.testing.assert_close(grad, x.cos())


def test_gradients_that_lie_otherwise_are_laid_out(run):
    x = torch.rand(2, 3, 4, 5, 6, requires_grad=True)
    found = run(lambda x: x * x, x)
    assert found.stride() == (360, 120, 1, 24, 4)
    weights = torch.rand(2, 3, 4, 5, 6)
    (grad,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(grad, 2 * x * weights)


def test_its_gradient_can_be_taken_twice_over_but_not_differentiated(run):
    x = torch.rand(4, requires_grad=True)
    found = run(lambda x: (x.sin() * x).exp().sum(), x)
    first, again = (torch.autograd.grad(found, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with pytest.raises(NotCapturable, match="cannot be differentiated again"):
        torch.autograd.grad(found, x, create_graph=True)


def test_a_gradient_that_a_function_takes_itself_is_differentiated(run):
    x = torch.rand(4, requires_grad=True)

    def step(x):
        (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        return x - 0.1 * grad

    found = run(step, run(step, x))
    (grad,) = torch.autograd.grad(found.sum(), x)
    (expected,) = torch.autograd.grad(step(step(x)).sum(), x)
    torch.testing.assert_close(grad, expected)
    assert len(run.regions) == 1


def test_parameters_of_the_meta_layer_have_gradients_beside_the_arguments(run, layer):
    x = torch.rand(5, 1, requires_grad=True)
    same(run, layer.base_layer.forward, x, inputs=[x, *layer.parameters()])


def test_without_gradients_to_take_nothing_is_kept_for_them(run):
    x = torch.rand(4, requires_grad=True)
    with torch.no_grad():
        found = run(lambda x: x.sin(), x)
    assert not found.requires_grad
    torch.testing.assert_close(found, x.sin().detach())
    assert [region.backward for region in run.regions.values()] == [None]


@pytest.mark.parametrize("function", ["times", "of_a_table", "as_long", "as_many", "so_many"])
def test_a_number_makes_regions_of_its_own_where_it_makes_a_difference(run, function):
    x, function = torch.rand(4), globals()[function]
    for number in (1, 2, 1, 0):
        torch.testing.assert_close(run(function, x, number), function(x, number))
    assert len(run.regions) == 3


def times(x, number):
    return x * number


def of_a_table(x, number):
    return x + [1.0, 5.0, 7.0][number]


def as_long(x, number):
    for _ in range(number):
        x = x.sin()
    return x


def as_many(x, number):
    return x, len("a" * number)


def so_many(x, number):
    return [x.sin() for _ in range(number)]


def test_a_number_that_makes_none_makes_one_region(run):
    x = torch.rand(4)
    for number in (2, 3):
        torch.testing.assert_close(run(plainly, x, number), x + 1)
        torch.testing.assert_close(run(of_constants, x, number), of_constants(x, number))
    assert len(run.regions) == 2


def plainly(x, number):
    return x + 1


def of_constants(x, number):
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_buffers_may_be_replaced(run, layer):
    layer.register_buffer("scale", torch.tensor(2.0))
    run.__init__(layer, run.cache)
    x = torch.rand(4)

    def scaled(x):
        return layer.scale * x

    for scale in (2.0, 5.0):
        layer.scale = torch.tensor(scale)
        torch.testing.assert_close(run(scaled, x), scale * x)
    assert len(run.regions) == 1


def test_what_has_not_been_compiled_is_refused_where_nobody_checks(layer):
    with pytest.raises(NotCompiled):
        RegionCompiler(layer, GraphCache())(plainly, torch.rand(4), 1)
