"""Functions with two written derivatives are what torch computes, and so are their derivatives; tables of positions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mlframework.backend.sequence_operators import (
    across,
    along,
    causal,
    gelu,
    least,
    rotations,
    to_unit_mean_square,
    turned,
)

pytestmark = pytest.mark.usefixtures("float64")


def slow_unit(x):
    return x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt()


FUNCTIONS = {"gelu": (gelu, F.gelu), "unit vectors": (partial(to_unit_mean_square, eps=0.01), slow_unit)}
every_function = pytest.mark.parametrize(("fast", "slow"), FUNCTIONS.values(), ids=FUNCTIONS)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def derivative(function):
    """A function whose derivatives are the higher ones of another."""
    return lambda x: torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]


@every_function
def test_values_are_those_of_torch(fast, slow):
    x = numbers(4, 6)
    torch.testing.assert_close(fast(x), slow(x))


@every_function
@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmapped"])
def test_derivatives_of_three_orders_are_those_of_finite_differences(fast, slow, batched):
    function = torch.func.vmap(fast) if batched else fast
    x = numbers(3, 5)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    assert torch.autograd.gradgradcheck(derivative(function), x)


@every_function
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e3])
def test_derivatives_far_out_are_numbers(fast, slow, size):
    x = torch.full((2, 4), size, dtype=torch.float32, requires_grad=True)
    once = torch.autograd.grad(fast(x).sum(), x, create_graph=True)[0]
    twice = torch.autograd.grad(once.sum(), x)[0]
    assert torch.isfinite(once).all()
    assert torch.isfinite(twice).all()


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmapped"])
@pytest.mark.parametrize(("fast", "slow"), [(across, lambda a, b: a @ b.mT), (along, torch.matmul)])
def test_products_and_their_derivatives_are_those_of_torch(fast, slow, batched):
    a, b = numbers(2, 3, 4), numbers(2, 5, 4) if fast is across else numbers(2, 4, 5)
    function = torch.func.vmap(fast) if batched else fast
    torch.testing.assert_close(function(a, b), slow(a, b))
    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))

    def twice(a, b):
        return torch.autograd.grad(function(a, b).square().sum(), (a, b), create_graph=True)

    assert torch.autograd.gradgradcheck(twice, (a, b))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_products_lie_as_their_matrices_do(transposed):
    a, b = numbers(2, 3, 4), numbers(2, 4, 5).mT if transposed else numbers(2, 5, 4)
    for matrix, grad in zip((a, b), torch.autograd.grad(across(a, b).square().sum(), (a, b)), strict=True):
        assert grad.stride() == matrix.stride()


def test_a_product_with_a_constant_has_the_gradient_by_the_other():
    a, b = numbers(2, 3, 4).detach(), numbers(2, 5, 4)
    (grad,) = torch.autograd.grad(across(a, b).sum(), b)
    torch.testing.assert_close(grad, a.sum(1, keepdim=True).expand_as(b))


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmapped"])
def test_turning_keeps_lengths_and_has_the_derivatives_of_finite_differences(batched):
    x, turns = numbers(2, 3, 6), rotations(torch.zeros(6), 3, 100.0)
    function = torch.func.vmap(lambda x: turned(x, *turns)) if batched else lambda x: turned(x, *turns)
    torch.testing.assert_close(function(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_rotations_are_cosines_and_sines_of_positions_times_rates():
    cosines, sines = rotations(torch.zeros(3, 6), 5, 100.0)
    angles = torch.tensor([[p * 100.0 ** (-2 * i / 6) for i in range(3)] for p in range(5)])
    torch.testing.assert_close(cosines, angles.cos())
    torch.testing.assert_close(sines, angles.sin())


def test_a_table_is_the_callers_own():
    causal(torch.zeros(1), 3, 3).fill_(1.0)
    assert (causal(torch.zeros(1), 3, 3).diagonal() == 0).all()


def test_what_is_hidden_twice_has_no_weight_and_a_softmax():
    hidden = causal(torch.zeros(1), 2, 4)
    assert (hidden == 0).tolist() == [[True, True, True, False], [True] * 4]
    assert (hidden.softmax(-1)[0, 3] == 0).item()
    assert torch.isfinite((hidden + least(hidden.dtype)).softmax(-1)).all()
