"""Inner update rules beside torch's optimizers, and the inner loop around them."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from mlframework.base_layers import BaseLayer
from mlframework.errors import InvalidValue
from mlframework.inner_loop import inner_loop
from mlframework.inner_updates import SGD, Adam, LearnedRates, Momentum
from mlframework.meta_layers.gradient_descent import MAML, Exact
from mlframework.outer_loop import MissingGradient, meta_gradient
from mlframework.tasks import Sinusoid

TASKS = 3


def params_of_one_task():
    return {"w": torch.randn(4, 2), "b": torch.randn(2)}


def losses(params, index=0):
    """A loss with curvature, other for every task: `[TASKS]`."""
    scale = torch.arange(1.0, TASKS + 1)
    return scale * (params["w"].sin().sum((1, 2)) + (params["w"].sum(1) * params["b"]).square().mean(1))


def stacked(params):
    return {name: p.expand(TASKS, *p.shape) for name, p in params.items()}


def trained_by(optimizer, start, steps):
    """The stacked parameters after every step of one of torch's optimizers."""
    params = {name: p.clone().requires_grad_() for name, p in stacked(start).items()}
    rule = optimizer(list(params.values()))
    for _ in range(steps):
        rule.zero_grad()
        losses(params).sum().backward()
        rule.step()
        yield {name: p.detach().clone() for name, p in params.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("update", "optimizer"),
    [
        (partial(SGD, lr=0.05), partial(torch.optim.SGD, lr=0.05)),
        (partial(LearnedRates, lr=0.05), partial(torch.optim.SGD, lr=0.05)),
        (partial(Momentum, lr=0.05, momentum=0.7), partial(torch.optim.SGD, lr=0.05, momentum=0.7)),
        # Ours has eps inside the root: with a small eps the denominators agree to rounding.
        (partial(Adam, lr=0.05, eps=1e-12), partial(torch.optim.Adam, lr=0.05, eps=1e-12)),
        (partial(Adam, lr=0.1, beta1=0.0, eps=1e-12), partial(torch.optim.Adam, lr=0.1, betas=(0.0, 0.999), eps=1e-12)),
        (partial(Adam, lr=0.1, beta2=0.5, eps=1e-12), partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.5), eps=1e-12)),
    ],
    ids=["sgd", "learned_rates", "momentum", "adam", "adam_without_mean", "adam_of_short_memory"],
)
def test_every_step_is_that_of_torchs_optimizer(update, optimizer):
    start = params_of_one_task()
    initial, *trajectory = inner_loop(losses, stacked(start), update(start), 6, constant_steps=6)
    torch.testing.assert_close(dict(initial), stacked(start))
    for found, wanted in zip(trajectory, trained_by(optimizer, start, 6), strict=True):
        torch.testing.assert_close(dict(found), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_adam_with_its_usual_eps_is_torchs_up_to_the_place_of_eps():
    start = params_of_one_task()
    found = list(inner_loop(losses, stacked(start), Adam(start, lr=0.05), 6, constant_steps=6))[1:]
    for ours, theirs in zip(found, trained_by(partial(torch.optim.Adam, lr=0.05), start, 6), strict=True):
        torch.testing.assert_close(dict(ours), theirs, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_every_learned_rate_scales_its_own_gradient():
    start = params_of_one_task()
    update = LearnedRates(start, lr=1.0)
    with torch.no_grad():
        for rate in update.rates:
            rate.copy_(torch.rand_like(rate))
    grads = {name: torch.randn(TASKS, *p.shape) for name, p in start.items()}
    moved, _ = update(stacked(start), grads, update.init(start), 0)
    for name, rate in zip(start, update.rates, strict=True):
        torch.testing.assert_close(moved[name], start[name] - rate * grads[name])


def test_learned_rates_are_meta_parameters_and_the_other_rules_have_none():
    start = params_of_one_task()
    assert [p.shape for p in LearnedRates(start, lr=0.1).parameters()] == [p.shape for p in start.values()]
    assert not [
        *SGD(start, lr=0.1).parameters(),
        *Momentum(start, lr=0.1).parameters(),
        *Adam(start, lr=0.1).parameters(),
    ]


@pytest.mark.usefixtures("float64")
def test_adam_has_a_finite_derivative_where_a_gradient_is_zero():
    start = {"w": torch.zeros(3)}
    gradient = torch.zeros(1, 3, requires_grad=True)
    update = Adam(start, lr=0.1)
    moved, _ = update({"w": torch.zeros(1, 3)}, {"w": gradient}, update.init({"w": torch.zeros(1, 3)}), 0)
    moved["w"].sum().backward()
    assert gradient.grad.isfinite().all()


@pytest.mark.parametrize(
    ("rule", "settings", "field"),
    [
        (SGD, {"lr": 0.0}, "lr"),
        (SGD, {"lr": float("nan")}, "lr"),
        (LearnedRates, {"lr": -1.0}, "lr"),
        (Momentum, {"lr": -0.1}, "lr"),
        (Momentum, {"lr": 0.1, "momentum": 1.0}, "momentum"),
        (Adam, {"lr": 0.0}, "lr"),
        (Adam, {"lr": 0.1, "beta1": -0.1}, "beta1"),
        (Adam, {"lr": 0.1, "beta2": 1.5}, "beta2"),
        (Adam, {"lr": 0.1, "eps": 0.0}, "eps"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(rule, settings, field):
    with pytest.raises(InvalidValue) as raised:
        rule(params_of_one_task(), **settings)
    assert raised.value.field == field


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("checkpoint_steps", [False, True])
def test_the_inner_loop_differentiates_through_all_steps_but_the_constant_ones(checkpoint_steps):
    """On a quadratic `c/2 * w^2`, `n` steps give `w * (1 - lr * c)^n`; constants leave a derivative of 1 per step."""
    w = torch.tensor([[3.0], [5.0]], requires_grad=True)
    curvature = torch.tensor([1.0, 2.0])

    def quadratic(params, step):
        return curvature / 2 * params["w"].square().sum(1)

    for constant_steps, wanted in [(0, (1 - 0.1 * curvature) ** 4), (3, 1 - 0.1 * curvature), (4, torch.ones(2))]:
        settings = {"constant_steps": constant_steps, "checkpoint_steps": checkpoint_steps}
        *_, adapted = inner_loop(quadratic, {"w": w}, SGD({"w": w[0]}, lr=0.1), 4, **settings)
        (gradient,) = torch.autograd.grad(adapted["w"].sum(), w)
        torch.testing.assert_close(gradient[:, 0], wanted)
        torch.testing.assert_close(adapted["w"][:, 0], w[:, 0] * (1 - 0.1 * curvature) ** 4)


class WithIdle(nn.Module):
    """A linear layer with two parameters that take no part."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)
        self.spare = nn.Parameter(torch.ones(2))
        self.other = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("update", [partial(SGD, lr=0.1), partial(Momentum, lr=0.1), partial(Adam, lr=0.1)])
def test_parameters_that_the_loss_does_not_depend_on_stay_and_are_named_once(update, caplog):
    task = Sinusoid(k_shot=3, k_query=3)
    base_layer = BaseLayer(WithIdle(), nn.Linear(2, 1))
    meta_layer = MAML(base_layer, task, update=update, meta_gradient=Exact(), inner_steps=3)
    episode = task.sample(2, "train", torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO):
        adapted = meta_layer.adapt(episode.support)
        with torch.no_grad():
            meta_layer.adapt(episode.support)
    assert torch.equal(adapted["features.spare"], torch.ones(2, 2))
    assert not torch.equal(adapted["features.linear.weight"][0], base_layer.features.linear.weight)
    (record,) = caplog.records
    assert record.name == "mlframework.inner_loop"
    assert "features.other, features.spare" in record.getMessage()
    with pytest.raises(MissingGradient, match=r"base_layer\.features\.spare, base_layer\.features\.other"):
        meta_gradient(meta_layer, episode)


def test_another_meta_layer_names_its_own_idle_parameters(caplog):
    task = Sinusoid(k_shot=3, k_query=3)
    episode = task.sample(2, "train", torch.Generator().manual_seed(0))
    for _ in range(2):
        base_layer = BaseLayer(WithIdle(), nn.Linear(2, 1))
        MAML(base_layer, task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1).adapt(episode.support)
    assert len(caplog.records) == 2
