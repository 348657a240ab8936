"""The four parts of MAML++, each against its formula and slow obvious versions, and alone on other algorithms."""

import copy
from functools import partial

import pytest
import reference
import torch
from hydra import compose, initialize_config_module
from torch.func import functional_call

from mlframework.base_layers import MLP, Conv4
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD, LayerStepRates
from mlframework.inner_loop.inner_loop import inner_loop
from mlframework.meta_layers import (
    MAML,
    AnnealedOrder,
    Exact,
    FirstOrder,
    LastStep,
    MultiStep,
    ParameterDifference,
    PerStepNorm,
)
from mlframework.runs import build
from mlframework.tasks import ArrayTasks, ClassIndexed
from mlframework.testing import check_meta_layer, directional_errors, in_float64
from mlframework.training.meta_gradient import meta_gradient
from mlframework.training.outer_loop import OuterLoop

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.3


def images():
    """3-way 2-shot tasks of random images."""
    x = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return ArrayTasks({"train": ClassIndexed.from_labels(x, torch.arange(60) % 6)}, n_way=3, k_shot=2, k_query=2)


TASK = images()


def mlp(spec):
    return MLP(spec, hidden=[8])


def maml(network=mlp, *, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"update": partial(SGD, lr=LR), "meta_gradient": Exact(), "inner_steps": 3, **settings}
    return MAML(network(TASK.spec), TASK, **settings)


def episode():
    return in_float64(TASK.sample(2, "train", torch.Generator().manual_seed(1)))


def gradients(meta_layer):
    """By the names that parameters have in the base layer."""
    meta_gradient(meta_layer, episode())
    return {name: p.grad.clone() for name, p in meta_layer.base_layer.named_parameters() if p.requires_grad}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


# Multi-step loss.


@pytest.mark.parametrize(
    ("outer_step", "wanted"),
    [
        (0, [0.2, 0.2, 0.2, 0.2, 0.2]),
        (1, [0.198, 0.198, 0.198, 0.198, 0.208]),
        (50, [0.1, 0.1, 0.1, 0.1, 0.6]),
        (97, [0.006, 0.006, 0.006, 0.006, 0.976]),  # the floor of 0.03 / 5 is reached
        (99, [0.006, 0.006, 0.006, 0.006, 0.976]),
        (100, [0.0, 0.0, 0.0, 0.0, 1.0]),
        (5000, [0.0, 0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_multi_step_weights_go_from_equal_to_the_last_step(outer_step, wanted):
    assert MultiStep(steps=100)(5, outer_step) == pytest.approx(wanted, abs=1e-12)


def test_with_one_inner_step_it_has_all_the_weight():
    assert MultiStep(steps=10)(1, 3) == LastStep()(1, 3) == [1.0]


def test_the_multi_step_loss_and_gradient_are_the_weighted_sums_of_those_after_every_step():
    meta_layer = maml(step_weights=MultiStep(steps=4))
    meta_layer.outer_step = 2
    losses, metrics = meta_gradient(meta_layer, episode())
    after = [reference.maml(meta_layer.base_layer, TASK, episode(), lr=LR, steps=steps) for steps in (1, 2, 3)]
    weights = [1 / 6, 1 / 6, 2 / 3]
    torch.testing.assert_close(losses, sum(w * loss for w, (loss, _) in zip(weights, after, strict=True)))
    wanted = {name: sum(w * g[name] for w, (_, g) in zip(weights, after, strict=True)) for name in after[0][1]}
    assert_same({name: p.grad for name, p in meta_layer.base_layer.named_parameters()}, wanted)
    torch.testing.assert_close(metrics["query_loss"], after[-1][0])


@pytest.mark.parametrize(("outer_step", "judged"), [(0, 3), (3, 3), (4, 1)])
def test_query_losses_that_weigh_nothing_are_not_computed(outer_step, judged, monkeypatch):
    meta_layer, calls = maml(step_weights=MultiStep(steps=4)), []
    judge = meta_layer.query_metrics
    monkeypatch.setattr(meta_layer, "query_metrics", lambda *args: calls.append(args) or judge(*args))
    meta_layer.outer_step = outer_step
    meta_layer.meta_loss(episode())
    assert len(calls) == judged


def test_the_multi_step_gradient_is_exact_for_the_weighted_loss_and_claimed_for_the_query_loss_only_at_the_end():
    def losses_of(meta_layer, episode):
        with torch.no_grad():
            return meta_layer.meta_loss(episode)[0]

    weighted = maml(step_weights=MultiStep(steps=4))
    assert not weighted.exact
    assert directional_errors(weighted, episode(), losses_of=losses_of).max() < 1e-7
    assert directional_errors(weighted, episode()).max() > 1e-3
    first_order = maml(step_weights=MultiStep(steps=4), meta_gradient=FirstOrder())
    assert directional_errors(first_order, episode(), losses_of=losses_of).max() > 1e-3
    weighted.outer_step = 4
    assert weighted.exact
    assert directional_errors(weighted, episode()).max() < 1e-7


def test_reptile_has_no_query_losses_to_weigh():
    with pytest.raises(InvalidValue, match="step_weights=MultiStep: weighs query losses"):
        maml(meta_gradient=ParameterDifference(), step_weights=MultiStep(steps=4))


# Rates per layer and step.


def test_every_step_has_its_own_rate_and_later_steps_the_last_one():
    """On `c/2 * w^2`, steps with rates a, b multiply `w` by `(1 - a c) (1 - b c)`."""
    start = {"w": torch.tensor([2.0]), "v": torch.tensor([5.0])}
    update = LayerStepRates(start, lr=1.0, steps=2)
    rates = {"w": [0.1, 0.2], "v": [0.3, 0.05]}
    update.rates.data = torch.tensor(list(rates.values()))
    stacked = {name: p.expand(1, 1) for name, p in start.items()}

    def losses(params, step):
        return (3 * params["w"].square() + 2 * params["v"].square()).sum(1) / 2

    *_, adapted = inner_loop(losses, stacked, update, 4)
    for name, curvature in {"w": 3, "v": 2}.items():
        first, last = (1 - rate * curvature for rate in rates[name])
        torch.testing.assert_close(adapted[name], start[name].view(1, 1) * first * last**3)


def test_one_rate_per_parameter_tensor_and_step_starts_at_lr():
    start = {"w": torch.randn(4, 2), "b": torch.randn(2)}
    (rates,) = LayerStepRates(start, lr=0.1, steps=5).parameters()
    assert torch.equal(rates, torch.full((2, 5), 0.1))


# Derivative-order annealing.


def test_the_gradient_is_first_order_before_the_given_outer_step_and_exact_from_it_on():
    annealed = maml(meta_gradient=AnnealedOrder(first_order_steps=7))
    for outer_step, same in [(0, FirstOrder()), (6, FirstOrder()), (7, Exact()), (8, Exact())]:
        annealed.outer_step = outer_step
        assert_same(gradients(annealed), gradients(maml(meta_gradient=same)))
        assert annealed.exact == isinstance(same, Exact)


def outer_loop(meta_layer):
    optimizer = torch.optim.SGD([p for p in meta_layer.parameters() if p.requires_grad], lr=0.1)
    return OuterLoop(meta_layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))


def test_the_outer_loop_says_which_step_it_is_and_goes_on_with_it_after_a_restart():
    """Five steps, of which the third is the first exact one, are the same with a break after the second."""
    whole = outer_loop(maml(meta_gradient=AnnealedOrder(2), step_weights=MultiStep(4)))
    seen = []
    for step in range(5):
        if step == 2:
            state = copy.deepcopy([part.state_dict() for part in (whole.meta_layer, whole.scheduler)])
        whole.step(episode())
        seen.append(whole.meta_layer.outer_step)
    assert seen == [0, 1, 2, 3, 4]
    resumed = outer_loop(maml(meta_gradient=AnnealedOrder(2), step_weights=MultiStep(4), seed=9))
    for part, values in zip((resumed.meta_layer, resumed.scheduler), state, strict=True):
        part.load_state_dict(values)
    for _ in range(3):
        resumed.step(episode())
    assert resumed.meta_layer.outer_step == 4
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.meta_layer.parameters(), whole.meta_layer.parameters(), strict=True)
    )


# Batch norms per step.


def per_step(**settings):
    meta_layer = maml(partial(Conv4, filters=4), norm=partial(PerStepNorm, steps=2), **settings)
    generator = torch.Generator().manual_seed(5)
    for weight in meta_layer.norm.weights:
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return meta_layer


def by_hand(meta_layer, steps):
    """Query losses after SGD where step `i` and the queries after it are normalised with the `i`-th weights."""
    losses = []
    for number in range(2):
        support, query = (type(part)(*(leaf[number] for leaf in part)) for part in episode())
        params = {name: meta_layer.base_layer.get_parameter(name) for name in meta_layer.adapted_names}
        for step in range(steps):
            pairs = zip(meta_layer.norm.names, meta_layer.norm.weights, strict=True)
            norms = {name: weight[min(step, 1)] for name, weight in pairs}
            loss = TASK.loss(functional_call(meta_layer.base_layer, {**params, **norms}, (support.x,)), support.y)
            found = torch.autograd.grad(loss.mean(), list(params.values()), create_graph=True)
            params = {name: p - LR * g for (name, p), g in zip(params.items(), found, strict=True)}
        prediction = functional_call(meta_layer.base_layer, {**params, **norms}, (query.x,))
        losses.append(TASK.loss(prediction, query.y).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_each_step_uses_its_own_batch_norm_weights_and_later_steps_the_last(steps):
    meta_layer = per_step(inner_steps=steps)
    wanted = by_hand(meta_layer, steps)
    losses, _ = meta_layer.meta_loss(episode())
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=0)
    learned = list(meta_layer.norm.parameters())
    found = torch.autograd.grad(losses.sum(), learned)
    for ours, theirs in zip(found, torch.autograd.grad(wanted.sum(), learned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_per_step_weights_do_not_adapt_and_replace_the_base_layers_own():
    meta_layer = per_step()
    norms = [f"features.{block}.1.{name}" for block in range(4) for name in ("weight", "bias")]
    assert sorted(meta_layer.norm.names) == sorted(norms)
    assert not set(norms) & set(meta_layer.adapted_names)
    assert not any(meta_layer.base_layer.get_parameter(name).requires_grad for name in norms)
    assert all(weight.shape == (2, 4) for weight in meta_layer.norm.weights)
    assert directional_errors(meta_layer, episode()).max() < 1e-6


def test_at_first_per_step_weights_are_the_base_layers_own():
    network = partial(Conv4, filters=4)
    separate = maml(network, norm=partial(PerStepNorm, steps=3))
    shared = maml(network, adapts=r"(\d\.0\.|^head)")
    assert set(separate.adapted_names) == set(shared.adapted_names)
    torch.testing.assert_close(separate.meta_loss(episode())[0], shared.meta_loss(episode())[0], rtol=1e-10, atol=0)


def test_a_base_layer_without_batch_norm_is_told_of(caplog):
    maml(norm=partial(PerStepNorm, steps=3))
    assert "no batch norm" in caplog.text


# Together.


@pytest.mark.parametrize(
    "part", ["update=layer_step_rates", "meta_gradient=annealed_order", "step_weights=multi_step", "norm=per_step"]
)
def test_each_part_alone_goes_with_another_algorithm(part):
    algorithm = "boil" if part != "meta_gradient=annealed_order" else "anil"
    overrides = [f"algorithm={algorithm}", f"algorithm/{part}", "task=digits", "base_layer=conv4", "task.n_way=2"]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, "base_layer.filters=4", "algorithm.inner_steps=2", "task.k_query=2"])
    check_meta_layer(partial(build.build_meta_layer, config), build.build_task(config), num_tasks=2)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (partial(MultiStep, steps=0), "steps"),
        (partial(MultiStep, steps=5, floor=-0.1), "floor"),
        (partial(AnnealedOrder, -1), "first_order_steps"),
        (partial(LayerStepRates, {"w": torch.ones(2)}, lr=0.1, steps=0), "steps"),
        (partial(LayerStepRates, {"w": torch.ones(2)}, lr=0.0, steps=2), "lr"),
        (partial(maml, norm=partial(PerStepNorm, steps=0)), "steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(make, field):
    with pytest.raises(InvalidValue) as raised:
        make()
    assert raised.value.field == field
