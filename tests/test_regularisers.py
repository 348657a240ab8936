"""Regularisers, each against values computed by hand; their meta-gradients against finite differences."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from scipy import stats
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call

from mlframework.base_layers import MLP, BaseLayer, Conv4, Perturbed, PerturbedConv4, Stack
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.task_set import judge_by_step
from mlframework.inner_loop import SGD, Adam
from mlframework.meta_layers import MAML, Exact, MetaLayer, Prototypes, StoppedLoss
from mlframework.regularisers import (
    Inequality,
    InformationPenalty,
    InnerDropout,
    LabelPermutation,
    MetaDropout,
    RandomKey,
    RandomTurn,
    TaskMixup,
)
from mlframework.regularisers.inequality import gini, theil, variance_of_logarithms
from mlframework.regularisers.information_penalty import kl_to_normal
from mlframework.runs import build, saved
from mlframework.tasks import ArrayTasks, ClassIndexed, DampedOscillator, Sinusoid, TextLists
from mlframework.testing import directional_errors
from mlframework.training import OuterLoop

PRESETS = (
    *("exchange_classes", "inequality", "information_penalty", "inner_dropout", "meta_dropout", "permute_labels"),
    "random_key",
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Numbered(ArrayTasks):
    """2-way 2-shot; an input is its class and its number in it, so that a row tells where it comes from."""

    def __init__(self):
        x = torch.stack(torch.meshgrid(torch.arange(30.0), torch.arange(6.0), indexing="ij"), -1)
        splits = dict.fromkeys(
            ("train", "validation", "test"), ClassIndexed.from_classes([f"class {c}" for c in range(30)], x)
        )
        super().__init__(splits, n_way=2, k_shot=2, k_query=3)


def maml(task, **settings):
    torch.manual_seed(0)
    settings = {"inner_steps": 2, "update": partial(SGD, lr=0.05), "meta_gradient": Exact(), **settings}
    return MAML(MLP(task.spec, hidden=[6, 5]), task, **settings)


def regularised(regulariser, task, **settings):
    layer = maml(task, **settings)
    layer.regularise({"this": regulariser})
    return layer


def before_step(regulariser, task, tasks=8, seed=0):
    """An episode as drawn and as the regulariser makes it."""
    episode = task.sample(tasks, "train", seeded(seed))
    return episode, regularised(regulariser, task).before_step(episode, seeded(seed + 1))


# Labels.


def test_permuted_labels_are_one_new_order_per_task():
    before, after = before_step(LabelPermutation(), Numbered(), tasks=400)
    assert torch.equal(before.joined().x, after.joined().x)
    swapped = after.joined().y != before.joined().y  # of two classes there are two orders
    assert (swapped == swapped[:, :1]).all()
    assert stats.binomtest(int(swapped[:, 0].sum()), 400).pvalue > 0.001


def test_exchanged_classes_are_whole_classes_from_tasks_of_the_same_meta_batch():
    before, after = before_step(LabelPermutation(between=True), Numbered(), tasks=50)
    rows_of = {}
    for part, name in zip(before, ("support", "query"), strict=True):
        for task in range(50):
            for label in range(2):
                rows_of[name, task, label] = part.x[task][part.y[task] == label].tolist()
    used = []
    for task in range(50):
        for label in range(2):
            found = {
                name: part.x[task][part.y[task] == label].tolist()
                for part, name in zip(after, ("support", "query"), strict=True)
            }
            (source,) = [
                (t, c) for t in range(50) for c in range(2) if all(found[name] == rows_of[name, t, c] for name in found)
            ]
            used.append(source)
    assert sorted(used) == sorted((t, c) for t in range(50) for c in range(2))  # each class is used once
    assert sum(used[2 * t][0] != used[2 * t + 1][0] for t in range(50)) > 30


# Regression targets.


def test_a_random_key_is_one_number_per_task_and_output():
    before, after = before_step(RandomKey(size=3.0), Sinusoid(), tasks=500)
    key = (after.joined().y - before.joined().y).squeeze(-1)
    torch.testing.assert_close(key, key[:, :1].expand_as(key), rtol=0, atol=1e-5)
    assert stats.kstest(key[:, 0].double(), stats.uniform(0, 3).cdf).pvalue > 0.001


def test_a_period_takes_targets_round():
    before, after = before_step(RandomKey(size=2.0, period=2.0), Sinusoid(), tasks=50)
    y, moved = before.joined().y, after.joined().y
    assert moved.min() >= 0
    assert moved.max() < 2
    key = (moved - y)[:, :1] % 2
    torch.testing.assert_close((moved - y - key + 1) % 2, torch.ones_like(y), rtol=0, atol=1e-5)


def test_a_random_turn_is_one_angle_per_task():
    task = DampedOscillator(4, 4, outputs=2)
    before, after = before_step(RandomTurn(), task, tasks=400)
    y, turned = (torch.view_as_complex(part.joined().y) for part in (before, after))
    ratio = turned / y  # multiplication by a complex number of modulus 1 is a turn
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert stats.kstest(ratio[:, 0].angle().double(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.001


# Mixup.


def test_a_mixed_task_lies_between_two_tasks_by_the_share_that_its_targets_tell():
    before, after = before_step(TaskMixup(alpha=2.0), Sinusoid(), tasks=200, seed=3)
    x, y = before.joined().x.double(), before.joined().y.double()
    mixed_x, mixed_y = after.joined().x.double(), after.joined().y.double()
    shares = []
    for task in range(200):
        # The other task and the share solve x' = s x + (1 - s) x_other for all inputs and, with them, all targets.
        own = torch.cat([x[task], y[task]]) - torch.cat([x, y], dim=1)  # [tasks, 2 n, 1], own minus each other
        gap = torch.cat([mixed_x[task], mixed_y[task]]) - torch.cat([x, y], dim=1)
        share = (own * gap).sum((1, 2)) / (own * own).sum((1, 2)).clamp(min=1e-12)
        error = (gap - share[:, None, None] * own).abs().amax((1, 2))
        other = int(error.argmin())
        assert error[other] < 1e-4
        if other != task:
            shares.append(float(share[other]))
    assert stats.kstest(shares, stats.beta(2, 2).cdf).pvalue > 0.001


def test_mixed_classes_keep_their_labels():
    before, after = before_step(TaskMixup(alpha=1.0), Numbered())
    assert torch.equal(before.joined().y, after.joined().y)
    assert not torch.equal(before.joined().x, after.joined().x)


def test_rows_without_a_partner_stay():
    task = Numbered()
    episode = task.sample(2, "train", seeded())
    mask = episode.support.mask.clone()
    mask[1, 2:] = 0
    episode = episode._replace(support=episode.support._replace(mask=mask))
    layer = regularised(TaskMixup(alpha=5.0), task)
    after = next(
        e
        for e in (layer.before_step(episode, seeded(s)) for s in range(9))
        if not torch.equal(e.query.x, episode.query.x)
    )
    assert torch.equal(after.support.x[0, 2:], episode.support.x[0, 2:])
    assert not torch.equal(after.support.x[0, :2], episode.support.x[0, :2])
    assert torch.equal(after.support.mask, mask)


# MR-MAML.


def test_the_divergence_is_that_of_torch():
    mean, log_deviation = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64)
    wanted = kl_divergence(Normal(mean, log_deviation.exp()), Normal(0.0, 0.7)).sum()
    torch.testing.assert_close(kl_to_normal(mean, log_deviation, 0.7), wanted)


def test_noise_stands_on_the_parameters_that_do_not_adapt_and_the_penalty_is_added():
    task = Sinusoid(5, 5)
    penalty = InformationPenalty(weight=0.01, deviation=0.3, prior=2.0)
    layer = regularised(penalty, task, adapts="head")
    episode = layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    losses, _ = layer.training_loss(episode)
    noisy, divergence = maml(task, adapts="head"), 0.0
    with torch.no_grad():
        for number, (name, p) in enumerate((n, p) for n, p in noisy.base_layer.named_parameters() if "head" not in n):
            divergence += float(kl_divergence(Normal(p, torch.full_like(p, 0.3)), Normal(0.0, 2.0)).sum())
            noise = penalty.get_buffer(f"noise_{number}")
            assert noise.abs().max() > 0, name
            p += 0.3 * noise
    torch.testing.assert_close(losses, noisy.meta_loss(episode)[0] + 0.01 * divergence)


def test_noise_is_standard_normal_and_drawn_anew():
    task = Sinusoid(5, 5)
    layer = regularised(InformationPenalty(weight=0.01, deviation=0.3), task, adapts="head")
    generator, drawn = seeded(), []
    for _ in range(200):
        layer.before_step(task.sample(1, "train", seeded()), generator)
        drawn.append(torch.cat([buffer.flatten() for name, buffer in layer.named_buffers() if "noise" in name]))
    assert stats.kstest(torch.stack(drawn).flatten().double(), "norm").pvalue > 0.001


def test_an_algorithm_without_inner_steps_has_noise_on_all_parameters():
    task = Numbered()
    layer = Prototypes(MLP(task.spec, hidden=[6]), task, distance="euclidean")
    layer.regularise({"this": InformationPenalty(weight=0.01, deviation=0.3)})
    assert layer.regularisers["this"].names == [name for name, _ in layer.base_layer.named_parameters()]


# TAML.


def test_measures_of_inequality_have_their_values():
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)  # 0.5 and 1.5 of the mean
    assert float(theil(losses)) == pytest.approx((0.5 * math.log(0.5) + 1.5 * math.log(1.5)) / 2)
    assert float(gini(losses)) == pytest.approx(0.25)  # mean difference (0 + 2 + 2 + 0) / 4 over 2 * 2
    assert float(variance_of_logarithms(losses)) == pytest.approx((math.log(3) / 2) ** 2)


@pytest.mark.parametrize("measure", [theil, gini, variance_of_logarithms])
def test_equal_losses_have_no_inequality_and_the_unit_does_not_matter(measure):
    assert float(measure(torch.full((5,), 0.3, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    losses = torch.rand(6, generator=seeded(), dtype=torch.float64) + 0.1
    torch.testing.assert_close(measure(losses), measure(7 * losses))


def test_the_inequality_is_that_of_the_query_losses_before_adaptation():
    task = Sinusoid(5, 5)
    layer = regularised(Inequality(weight=0.5, measure="theil"), task)
    episode = task.sample(4, "train", seeded())
    start = functional_call(
        layer.base_layer, dict(layer.base_layer.named_parameters()), (episode.query.x.flatten(0, 1),)
    )
    losses = (start.view_as(episode.query.y) - episode.query.y).square().mean((1, 2))
    torch.testing.assert_close(layer.training_loss(episode)[0], layer.meta_loss(episode)[0] + 0.5 * theil(losses))


# The inner loop.


@pytest.mark.parametrize("update", [partial(SGD, lr=0.05), partial(Adam, lr=0.05)])
def test_dropped_numbers_do_not_adapt(update):
    task = Sinusoid(5, 5)
    dropout = InnerDropout(rate=0.5)
    layer = regularised(dropout, task, update=update)
    episode = layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    before = dict(layer.base_layer.named_parameters())

    def moved(inside):
        adapted = layer.adapt(inside.support)
        found = {name: (value != before[name]) for name, value in adapted.items()}
        kept = {name: dropout.get_buffer(f"kept_{number}") for number, name in enumerate(dropout.names)}
        assert set(torch.cat([value.flatten() for value in kept.values()]).tolist()) == {0.0, 2.0}
        assert all(not value[:, kept[name] == 0].any() for name, value in found.items())
        assert any(value.any() for value in found.values())
        return torch.zeros(3), {}

    dropout.meta_loss(layer, episode, moved)
    assert any(
        (value != before[name])[:, dropout.get_buffer(f"kept_{n}") == 0].any()
        for n, (name, value) in enumerate(layer.adapt(episode.support).items())
    )  # outside of training


def test_one_step_along_kept_gradients_is_twice_as_long():
    task = Sinusoid(5, 5)
    dropout = InnerDropout(rate=0.5)
    layer = regularised(dropout, task, inner_steps=1)
    episode = layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    whole = layer.adapt(episode.support)

    def compare(inside):
        for number, (name, value) in enumerate(layer.adapt(inside.support).items()):
            start, kept = layer.base_layer.get_parameter(name), dropout.get_buffer(f"kept_{number}")
            torch.testing.assert_close(value - start, (whole[name] - start) * kept, rtol=1e-4, atol=1e-6)
        return torch.zeros(3), {}

    dropout.meta_loss(layer, episode, compare)


def test_a_task_stops_when_its_support_loss_is_below_the_limit_and_others_go_on():
    task = Sinusoid(10, 5)
    episode = task.sample(8, "train", seeded())
    layer = maml(task, inner_loss=partial(StoppedLoss, limit=0.0), inner_steps=4)
    path = list(layer.trajectory(episode.support, 4))
    losses = torch.stack([layer.inner_losses(params, 0, episode.support).detach() for params in path])  # [steps, tasks]
    limit = float(losses[1].median()) + 1e-9
    stopped = maml(task, inner_loss=partial(StoppedLoss, limit=limit), inner_steps=4)
    for step, params in enumerate(stopped.trajectory(episode.support, 4)):
        for number in range(8):
            below = (losses[:, number] <= limit).nonzero().flatten().tolist()
            at = min([step, *below[:1]])
            for name, value in params.items():
                torch.testing.assert_close(value[number], path[at][name][number])


# Meta-dropout.


def perturbed(task, dropout=None, **settings):
    """MAML on two perturbed layers, whose scales do not adapt."""
    torch.manual_seed(0)
    layers = [
        Perturbed(Stack(torch.nn.Linear(n, m), torch.nn.Tanh()), n, m, deviation=0.8)
        for n, m in ((task.spec.x_shape[0], 6), (6, 5))
    ]
    network = BaseLayer(Stack(*layers), torch.nn.Linear(5, task.spec.out_features))
    for layer in layers:  # noise of a linear map of the input, not of its start at 0
        torch.nn.init.normal_(layer.scale.weight, std=0.2)
    settings = {"inner_steps": 2, "update": partial(SGD, lr=0.05), "meta_gradient": Exact(), **settings}
    layer = MAML(network, task, adapts="head|block", **settings)
    layer.regularise({} if dropout is None else {"this": dropout})
    return layer


def test_a_perturbed_network_starts_as_the_plain_one():
    task = ArrayTasks(dict.fromkeys(("train", "validation", "test"), digits_by_class()), n_way=2, k_shot=1, k_query=1)
    plain, scaled = Conv4(task.spec, filters=4), PerturbedConv4(task.spec, filters=4)
    weights = {name.replace("block.", ""): p for name, p in scaled.named_parameters() if "scale" not in name}
    plain.load_state_dict(weights)
    x = torch.randn(5, *task.spec.x_shape, generator=seeded())
    torch.testing.assert_close(scaled(x), plain(x))


def digits_by_class():
    return ClassIndexed.from_classes(["a", "b"], torch.randn(2, 3, 1, 16, 16, generator=seeded()))


def test_meta_dropout_scales_the_support_set_of_the_inner_loop_and_nothing_else():
    task, dropout = Sinusoid(5, 7), MetaDropout()
    layer, plain = perturbed(task, dropout, inner_steps=1), perturbed(task, inner_steps=1)
    episode = layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    first, second = plain.base_layer.features
    losses = layer.training_loss(episode)[0]
    for number, (x, y) in enumerate(zip(episode.support.x, episode.support.y, strict=True)):
        own = {name: p for name, p in plain.base_layer.named_parameters() if "scale" not in name}
        h = x
        for place, part in enumerate((first, second)):
            noise = dropout.get_buffer(f"noise_{place}")
            h = part.block(h) * torch.nn.functional.softplus(part.scale(h) + 0.8 * noise)
        loss = (plain.base_layer.head(h) - y).square().mean()
        grads = torch.autograd.grad(loss, list(own.values()))
        moved = {name: p - 0.05 * grad for (name, p), grad in zip(own.items(), grads, strict=True)}
        asked = functional_call(plain.base_layer, moved, (episode.query.x[number],))  # without noise
        torch.testing.assert_close(losses[number], (asked - episode.query.y[number]).square().mean())


@pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0])
def test_without_noise_the_factor_is_the_mean_over_the_noise(deviation):
    layer = Perturbed(torch.nn.Identity(), 1, 1, deviation=deviation)
    assert layer(torch.ones(1, 1)).item() == pytest.approx(1, abs=1e-5)
    torch.nn.init.constant_(layer.scale.weight, -0.7)
    logit, z = layer.scale(torch.ones(1, 1)).item(), stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    wanted = np.log1p(np.exp(logit + deviation * z)).mean()
    assert layer(torch.ones(1, 1)).item() == pytest.approx(wanted, rel=2e-3)


def test_a_mini_batch_has_the_noise_of_its_first_rows():
    layer = Perturbed(torch.nn.Identity(), 2, 2)
    layer.noise = torch.randn(6, 2, generator=seeded())
    x = torch.ones(4, 2)
    torch.testing.assert_close(layer(x), torch.nn.functional.softplus(layer.scale(x) + layer.noise[:4]))


def test_the_noise_of_meta_dropout_is_normal_and_drawn_anew():
    task, dropout = Sinusoid(5, 5), MetaDropout()
    layer, generator, drawn = perturbed(task, dropout), seeded(), []
    for _ in range(200):
        layer.before_step(task.sample(1, "train", seeded()), generator)
        drawn.append(torch.cat([buffer.flatten() for name, buffer in dropout.named_buffers()]))
    assert stats.kstest(torch.stack(drawn).flatten().double(), "norm").pvalue > 0.001


def test_the_outer_loop_learns_how_examples_are_perturbed():
    task = Sinusoid(5, 5)
    layer = perturbed(task, MetaDropout())
    episode = layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    layer.training_loss(episode)[0].sum().backward()
    assert all(part.scale.weight.grad.abs().max() > 0 for part in layer.base_layer.features)


# What holds for all.


LOSSES = {
    "information_penalty": lambda: InformationPenalty(weight=0.01, deviation=0.3),
    "theil": lambda: Inequality(weight=2.0, measure="theil"),
    "gini": lambda: Inequality(weight=2.0, measure="gini"),
    "variance_of_logarithms": lambda: Inequality(weight=2.0, measure="variance_of_logarithms"),
    "inner_dropout": lambda: InnerDropout(rate=0.3),
}


@pytest.mark.parametrize("name", [*LOSSES, "meta_dropout"])
def test_the_meta_gradient_is_that_of_the_regularised_loss(name):
    task = Sinusoid(5, 5)
    if name == "meta_dropout":
        layer = perturbed(task, MetaDropout()).double()
    else:
        layer = regularised(LOSSES[name](), task, adapts="head|features.3").double()
    drawn = task.sample(3, "train", seeded())
    episode = Episode(*(Examples(*(leaf.double() for leaf in part)) for part in drawn))
    layer.before_step(episode, seeded(1))
    errors = directional_errors(
        layer, episode, losses_of=lambda layer, episode: layer.training_loss(episode)[0].detach()
    )
    assert float(errors.median()) < 1e-6


def test_several_regularisers_compose_in_their_order():
    task = Sinusoid(5, 5)
    layer = maml(task, adapts="head")
    layer.regularise(
        {"one": Inequality(weight=1.0, measure="gini"), "two": InformationPenalty(weight=0.1, deviation=0.2)}
    )
    episode = layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    inner, outer = layer.regularisers.values()
    expected = outer.meta_loss(layer, episode, lambda e: inner.meta_loss(layer, e, layer.meta_loss))[0]
    torch.testing.assert_close(layer.training_loss(episode)[0], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_an_evaluation_does_without_regularisers(name):
    task = Sinusoid(5, 5)
    layer, plain = regularised(LOSSES[name](), task, adapts="head"), maml(task, adapts="head")
    layer.before_step(task.sample(3, "train", seeded()), seeded(1))
    episode = task.sample(4, "test", seeded())
    found, wanted = (judge_by_step(each, episode, 2)["query_loss"] for each in (layer, plain))
    assert torch.equal(found, wanted)


def test_a_saved_algorithm_is_read_without_its_regularisers(tmp_path):
    task = Sinusoid(5, 5)
    layer = regularised(InformationPenalty(weight=0.01, deviation=0.3), task, adapts="head")
    saved.save(layer, tmp_path / "algorithm")
    found, episode = saved.read(tmp_path / "algorithm"), task.sample(4, "test", seeded())
    assert not found.regularisers
    assert layer.regularisers
    rows = [judge_by_step(each, episode, 2)["query_loss"] for each in (layer, found)]
    assert torch.equal(*rows)


def test_without_regularisers_the_training_loss_is_the_meta_loss_and_nothing_is_drawn():
    task, generator = Sinusoid(5, 5), seeded()
    layer, state = maml(task), generator.get_state()
    episode = task.sample(3, "train", seeded())
    assert layer.before_step(episode, generator) is episode
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(layer.training_loss(episode)[0], layer.meta_loss(episode)[0])


REFUSED = [
    (lambda: regularised(RandomKey(size=1.0), Numbered()), "is for a regression, and Numbered is a classification"),
    (lambda: regularised(RandomTurn(), Sinusoid()), "turns points in a plane, and Sinusoid has 1 outputs"),
    (lambda: regularised(LabelPermutation(), Sinusoid()), "is for a classification, and Sinusoid is a regression"),
    (
        lambda: regularised(TaskMixup(alpha=1.0), TextLists(k_shot=2, k_query=2, length=8)),
        "and TextLists is a sequence",
    ),
    (lambda: regularised(InformationPenalty(weight=1.0, deviation=0.1), Sinusoid()), "as in algorithm.adapts=head"),
    (lambda: on_prototypes(InnerDropout(rate=0.1)), "Prototypes has none: use algorithm=maml"),
    (lambda: regularised(MetaDropout(), Sinusoid()), "needs perturbed layers: use base_layer=perturbed"),
    (lambda: on_prototypes(MetaDropout()), "Prototypes has none: use algorithm=maml"),
    (lambda: with_adapting_scales(), r"features\.0\.scale\.weight must not adapt: use 'algorithm\.adapts=head|block'"),
    (lambda: on_prototypes(Inequality(weight=1.0, measure="gini")), "Prototypes has no inner steps"),
]


def with_adapting_scales():
    task = Sinusoid()
    network = BaseLayer(Stack(Perturbed(torch.nn.Linear(1, 3), 1, 3)), torch.nn.Linear(3, 1))
    settings = {"inner_steps": 2, "update": partial(SGD, lr=0.05), "meta_gradient": Exact()}
    MAML(network, task, **settings).regularise({"this": MetaDropout()})


def on_prototypes(regulariser):
    task = Numbered()
    layer = Prototypes(MLP(task.spec, hidden=[4]), task, distance="euclidean")
    layer.regularise({"this": regulariser})


@pytest.mark.parametrize(("make", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_a_task_or_an_algorithm_that_does_not_go_with_one_is_named_in_one_line(make, line):
    with pytest.raises(UserError, match=r"^regulariser\.this: .*" + line):
        make()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: RandomKey(size=0.0), "size=0.0: must be above 0"),
        (lambda: RandomKey(size=1.0, period=-1.0), "period=-1.0: must be above 0"),
        (lambda: TaskMixup(alpha=0.0), "alpha=0.0: must be above 0"),
        (lambda: InformationPenalty(weight=-1.0, deviation=0.1), "weight=-1.0: must be at least 0"),
        (lambda: Inequality(weight=1.0, measure="gnii"), r"measure=gnii: must be one of .* \(did you mean gini\?\)"),
        (lambda: Perturbed(torch.nn.Identity(), 1, 1, deviation=-1.0), "deviation=-1.0: must be at least 0"),
        (lambda: InnerDropout(rate=1.0), "rate=1.0: must be at least 0 and below 1"),
        (lambda: StoppedLoss(Sinusoid(), -0.1), "limit=-0.1: must be at least 0"),
    ],
)
def test_a_wrong_setting_is_one_line(make, line):
    with pytest.raises(InvalidValue, match=line):
        make()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_with_the_algorithm(name):
    task = "sinusoid" if name in ("inequality", "information_penalty", "inner_dropout", "random_key") else "digits"
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        network = ["base_layer=perturbed_conv4"] if name == "meta_dropout" else []
        config = compose("train", [f"regulariser=[{name}]", f"task={task}", "algorithm.adapts=head", *network])
    layer = build.build_meta_layer(config, build.build_task(config))
    assert list(layer.regularisers) == [name]
    assert isinstance(layer, MetaLayer)
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "regularisers"),
    [
        (
            partial(maml, adapts="head"),
            {
                "noise": partial(InformationPenalty, weight=0.01, deviation=0.3),
                "dropout": partial(InnerDropout, rate=0.5),
                "inequality": partial(Inequality, weight=1.0, measure="theil"),
            },
        ),
        (lambda task: perturbed(task), {"dropout": MetaDropout}),
    ],
)
def test_compiled_steps_with_new_random_numbers_each_are_the_eager_ones(layers, regularisers):
    task, ends = Sinusoid(5, 5), []
    for capture in ("false", "true"):
        layer = layers(task)
        layer.regularise({name: make() for name, make in regularisers.items()})
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        outer = OuterLoop(layer, optimizer, scheduler, capture=capture)
        generator = seeded()
        for _ in range(5):
            outer.step(layer.before_step(task.sample(4, "train", generator), generator))
        assert capture == "false" or list(outer.capture.decided.values()) == [True]
        ends.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
