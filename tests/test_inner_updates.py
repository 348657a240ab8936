"""Inner update rules beside torch's optimizers, and the inner loop around them."""

import logging
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

from mlframework.base_layers import MLP, BaseLayer
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD, Adam, LearnedRates, LearnedUpdate, MetaCurvature, Momentum, RMSprop
from mlframework.inner_loop.inner_loop import inner_loop
from mlframework.inner_loop.learned_update import preprocessed
from mlframework.meta_layers import MAML, Exact
from mlframework.runs import build
from mlframework.tasks import Sinusoid
from mlframework.training.meta_gradient import MissingGradient, meta_gradient

TASKS = 3
UPDATES = Path(__file__).parent.parent / "conf" / "algorithm" / "update"


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
        (partial(MetaCurvature, lr=0.05), partial(torch.optim.SGD, lr=0.05)),
        (partial(Momentum, lr=0.05, momentum=0.7), partial(torch.optim.SGD, lr=0.05, momentum=0.7)),
        # Ours has eps inside the root: with a small eps the denominators agree to rounding.
        (partial(Adam, lr=0.05, eps=1e-12), partial(torch.optim.Adam, lr=0.05, eps=1e-12)),
        (partial(Adam, lr=0.1, beta1=0.0, eps=1e-12), partial(torch.optim.Adam, lr=0.1, betas=(0.0, 0.999), eps=1e-12)),
        (partial(Adam, lr=0.1, beta2=0.5, eps=1e-12), partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.5), eps=1e-12)),
        (partial(RMSprop, lr=0.05, decay=0.9, eps=1e-12), partial(torch.optim.RMSprop, lr=0.05, alpha=0.9, eps=1e-12)),
    ],
    ids=[
        "sgd",
        "learned_rates",
        "meta_curvature_of_identities",
        "momentum",
        "adam",
        "adam_without_mean",
        "adam_of_short_memory",
        "rmsprop",
    ],
)
def test_every_step_is_that_of_torchs_optimizer(update, optimizer):
    start = params_of_one_task()
    initial, *trajectory = inner_loop(losses, stacked(start), update(start), 6, detached_steps=6)
    torch.testing.assert_close(dict(initial), stacked(start))
    for found, wanted in zip(trajectory, trained_by(optimizer, start, 6), strict=True):
        torch.testing.assert_close(dict(found), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_adam_with_its_usual_eps_is_torchs_up_to_the_place_of_eps():
    start = params_of_one_task()
    found = list(inner_loop(losses, stacked(start), Adam(start, lr=0.05), 6, detached_steps=6))[1:]
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
def test_meta_curvature_multiplies_each_gradient_by_the_kronecker_product_of_its_matrices():
    params = {"conv": torch.randn(3, 2, 2, 2), "linear": torch.randn(4, 3), "bias": torch.randn(4)}
    update = MetaCurvature(params, lr=1.0)
    assert [tuple(m.shape) for m in update.matrices] == [(3, 3), (2, 2), (4, 4), (4, 4), (3, 3), (4,)]
    for matrix in update.matrices:
        matrix.data = torch.randn_like(matrix)
    outputs, inputs, kernel, rows, columns, factor = update.matrices
    whole = {
        "conv": torch.kron(outputs, torch.kron(inputs, kernel)),
        "linear": torch.kron(rows, columns),
        "bias": torch.diag(factor),
    }
    grads = {name: torch.randn(TASKS, *p.shape) for name, p in params.items()}
    moved, _ = update(stacked(params), grads, (), 0)
    for name, p in params.items():
        step = (grads[name].flatten(1) @ whole[name].mT).view_as(grads[name])
        torch.testing.assert_close(moved[name], p - step)


@pytest.mark.usefixtures("float64")
def test_gradients_are_preprocessed_into_magnitude_and_direction():
    """The two cases of appendix A, one number at a time."""
    e = math.e
    for g, wanted in {
        e**-3: (-0.3, 1.0),
        -(e**2): (0.2, -1.0),
        e**-12: (-1.0, e**-2),
        -(e**-11): (-1.0, -(e**-1)),
        0.0: (-1.0, 0.0),
    }.items():
        found = preprocessed(torch.tensor(g))
        assert tuple(float(part) for part in found) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_learned_update_serves_each_coordinate_alone_and_remembers_a_mean():
    start = params_of_one_task()
    update = LearnedUpdate(start, lr=0.5, hidden=3, memory=0.75)
    grads = [{name: torch.randn(TASKS, *p.shape) for name, p in start.items()} for _ in range(2)]
    params, state = stacked(start), update.init(stacked(start))
    with torch.no_grad():
        for step, found in enumerate(grads):
            params, state = update(params, found, state, step)
    p, mean = float(start["w"][3, 1]), 0.0
    for found in grads:
        g = float(found["w"][2, 3, 1])
        mean = 0.75 * mean + 0.25 * g
        read = [float(part) for value in (g, mean) for part in preprocessed(torch.tensor(value))]
        a, b = update.network(torch.tensor(read)).tolist()
        p -= 0.5 * ((1 + a) * g + b * mean)
    assert float(params["w"][2, 3, 1]) == pytest.approx(p, rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_learned_update_begins_near_gradient_descent():
    start = params_of_one_task()
    _, learned = inner_loop(losses, stacked(start), LearnedUpdate(start, lr=0.05), 1)
    _, plain = inner_loop(losses, stacked(start), SGD(start, lr=0.05), 1)
    for name, p in start.items():
        assert (learned[name] - plain[name]).norm() < 0.05 * (plain[name] - p).norm()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", [Adam, RMSprop, LearnedUpdate])
def test_there_is_a_finite_derivative_where_a_gradient_is_zero(rule):
    start = {"w": torch.zeros(3)}
    gradient = torch.zeros(1, 3, requires_grad=True)
    update = rule(start, lr=0.1)
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
        (RMSprop, {"lr": 0.0}, "lr"),
        (RMSprop, {"lr": 0.1, "decay": 1.0}, "decay"),
        (RMSprop, {"lr": 0.1, "eps": -1.0}, "eps"),
        (MetaCurvature, {"lr": 0.0}, "lr"),
        (LearnedUpdate, {"lr": 0.0}, "lr"),
        (LearnedUpdate, {"lr": 0.1, "hidden": 0}, "hidden"),
        (LearnedUpdate, {"lr": 0.1, "memory": 1.0}, "memory"),
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

    for detached_steps, wanted in [(0, (1 - 0.1 * curvature) ** 4), (3, 1 - 0.1 * curvature), (4, torch.ones(2))]:
        settings = {"detached_steps": detached_steps, "checkpoint_steps": checkpoint_steps}
        *_, adapted = inner_loop(quadratic, {"w": w}, SGD({"w": w[0]}, lr=0.1), 4, **settings)
        (gradient,) = torch.autograd.grad(adapted["w"].sum(), w)
        torch.testing.assert_close(gradient[:, 0], wanted)
        torch.testing.assert_close(adapted["w"][:, 0], w[:, 0] * (1 - 0.1 * curvature) ** 4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("weight_decay", "clip"), [(0.3, None), (0.0, 2.0), (0.3, 2.0)])
def test_decay_and_clipping_are_those_of_torch_for_each_task_alone(weight_decay, clip):
    """Some of the gradients are clipped, some are not."""
    start, shortened = params_of_one_task(), []
    *_, found = inner_loop(losses, stacked(start), SGD(start, lr=0.05), 5, weight_decay=weight_decay, clip=clip)
    for task in range(TASKS):
        params = {name: p.clone().requires_grad_() for name, p in start.items()}
        rule = torch.optim.SGD(params.values(), lr=0.05, weight_decay=weight_decay)
        for _ in range(5):
            rule.zero_grad()
            losses({name: p.expand(TASKS, *p.shape) for name, p in params.items()})[task].backward()
            if clip is not None:
                norm = nn.utils.clip_grad_norm_(params.values(), clip)
                shortened.append(bool(norm > clip))
            rule.step()
        for name, p in params.items():
            # torch adds 1e-6 to the norm that it divides by.
            torch.testing.assert_close(found[name][task], p.detach(), rtol=0, atol=1e-5)
    assert clip is None or len(set(shortened)) == 2


@pytest.mark.usefixtures("float64")
def test_the_decay_of_a_constant_step_is_constant_and_clipping_is_differentiable_at_zero():
    w = torch.tensor([[3.0]], requires_grad=True)

    def quadratic(params, step):
        return params["w"].square().sum(1) / 2

    for detached_steps, wanted in [(0, 1 - 0.1 * 1.5), (1, 1.0)]:
        _, moved = inner_loop(
            quadratic, {"w": w}, SGD({"w": w[0]}, lr=0.1), 1, detached_steps=detached_steps, weight_decay=0.5
        )
        (gradient,) = torch.autograd.grad(moved["w"].sum(), w)
        assert float(gradient) == pytest.approx(wanted)
    zero = torch.zeros(1, 1, requires_grad=True)
    _, moved = inner_loop(quadratic, {"w": zero}, SGD({"w": zero[0]}, lr=0.1), 1, clip=1.0)
    (gradient,) = torch.autograd.grad(moved["w"].sum(), zero)
    assert float(gradient) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("field", "value"), [("inner_weight_decay", -0.1), ("inner_clip", 0.0), ("inner_clip", float("nan"))]
)
def test_decay_and_clipping_that_make_no_sense_are_refused_by_name(field, value):
    task = Sinusoid(k_shot=3, k_query=3)
    settings = {"update": partial(SGD, lr=0.1), "meta_gradient": Exact(), "inner_steps": 1}
    with pytest.raises(InvalidValue) as raised:
        MAML(MLP(task.spec, hidden=[4]), task, **settings, **{field: value})
    assert raised.value.field == field


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
    assert record.name == "mlframework.inner_loop.inner_loop"
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


@pytest.mark.parametrize("update", sorted(path.stem for path in UPDATES.glob("*.yaml")))
@pytest.mark.parametrize("algorithm", ["anil", "reptile"])
def test_every_update_rule_goes_with_every_way_to_the_meta_gradient(algorithm, update):
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [f"algorithm={algorithm}", f"algorithm/update={update}", "algorithm.inner_steps=2"])
    task = Sinusoid(k_shot=3, k_query=3)
    meta_layer = build.build_meta_layer(config, task)
    adapted = meta_layer.adapt(task.sample(2, "train", torch.Generator().manual_seed(0)).support)
    assert not torch.equal(adapted["head.bias"][0], meta_layer.base_layer.head.bias)
