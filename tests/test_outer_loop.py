"""From the meta-loss to a step of the optimizer."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from mlframework.backend import plan as plan_module
from mlframework.backend.plan import ExecutionPlan
from mlframework.base_layers import MLP
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD, LearnedRates
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid
from mlframework.training.meta_gradient import MissingGradient, meta_gradient
from mlframework.training.outer_loop import NotFinite, OuterLoop

pytestmark = pytest.mark.usefixtures("float64")


def maml(update=partial(SGD, lr=0.01), **settings):  # noqa: B008
    torch.manual_seed(0)
    task = Sinusoid(k_shot=4, k_query=4)
    network = MLP(task.spec, hidden=[6])
    return MAML(network, task, update=update, meta_gradient=Exact(), inner_steps=2, **settings)


def outer_loop(meta_layer, *, lr=0.1, gamma=1.0, **settings):
    optimizer = torch.optim.SGD([p for p in meta_layer.parameters() if p.requires_grad], lr=lr)
    return OuterLoop(meta_layer, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma), **settings)


def episode_of(meta_layer, num_tasks=6, seed=0):
    episode = meta_layer.task.sample(num_tasks, "train", torch.Generator().manual_seed(seed))
    return episode._replace(
        support=episode.support._replace(x=episode.support.x.double(), y=episode.support.y.double()),
        query=episode.query._replace(x=episode.query.x.double(), y=episode.query.y.double()),
    )


def parameters(meta_layer):
    return {name: p.detach().clone() for name, p in meta_layer.named_parameters()}


def gradient_norm(meta_layer):
    return torch.stack([p.grad.norm() for p in meta_layer.parameters()]).norm()


def test_the_meta_gradient_is_the_mean_over_tasks_of_every_tasks_own():
    meta_layer = maml()
    episode = episode_of(meta_layer)
    losses, _ = meta_gradient(meta_layer, episode)
    found = [p.grad.clone() for p in meta_layer.parameters()]
    alone = []
    for number, part in enumerate(episode.chunks(1)):
        (loss,), _ = meta_gradient(meta_layer, part)
        torch.testing.assert_close(loss, losses[number])
        alone.append([p.grad.clone() for p in meta_layer.parameters()])
    for gradient, *singles in zip(found, *alone, strict=True):
        torch.testing.assert_close(gradient, torch.stack(singles).mean(0))


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_chunks_change_neither_losses_metrics_nor_gradient(chunk):
    meta_layer = maml(partial(LearnedRates, lr=0.01))
    episode = episode_of(meta_layer)
    losses, metrics = meta_gradient(meta_layer, episode)
    found = [p.grad.clone() for p in meta_layer.parameters()]
    chunked, chunked_metrics = meta_gradient(meta_layer, episode, chunk=chunk)
    torch.testing.assert_close(chunked, losses)
    torch.testing.assert_close(chunked_metrics, metrics)
    torch.testing.assert_close([p.grad for p in meta_layer.parameters()], found)


def test_gradients_do_not_pile_up():
    meta_layer = maml()
    episode = episode_of(meta_layer)
    meta_gradient(meta_layer, episode)
    found = [p.grad.clone() for p in meta_layer.parameters()]
    meta_gradient(meta_layer, episode)
    torch.testing.assert_close([p.grad for p in meta_layer.parameters()], found, rtol=0, atol=0)


def test_a_step_goes_down_the_meta_gradient_and_reports_means_over_tasks():
    meta_layer = maml()
    before, episode = parameters(meta_layer), episode_of(meta_layer)
    losses, _ = meta_gradient(meta_layer, episode)
    gradients, norm = {n: p.grad.clone() for n, p in meta_layer.named_parameters()}, gradient_norm(meta_layer)
    metrics = outer_loop(meta_layer, lr=0.1).step(episode)
    for name, p in parameters(meta_layer).items():
        torch.testing.assert_close(p, before[name] - 0.1 * gradients[name])
    torch.testing.assert_close(metrics["query_loss"], losses.mean())
    torch.testing.assert_close(metrics["meta_grad_norm"], norm)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


def test_steps_on_one_meta_batch_reduce_its_loss():
    meta_layer = maml()
    outer, episode = outer_loop(meta_layer, lr=0.02), episode_of(meta_layer)
    values = [float(outer.step(episode)["query_loss"]) for _ in range(20)]
    assert values[-1] < 0.9 * values[0]


def test_clipping_shortens_long_gradients_to_its_limit_and_leaves_short_ones():
    meta_layer = maml()
    before, episode = parameters(meta_layer), episode_of(meta_layer)
    meta_gradient(meta_layer, episode)
    norm = float(gradient_norm(meta_layer))
    for clip, wanted in [(norm / 7, norm / 7), (norm * 2, norm), (None, norm)]:
        with torch.no_grad():
            for name, p in meta_layer.named_parameters():
                p.copy_(before[name])
        metrics = outer_loop(meta_layer, lr=1.0, clip=clip).step(episode)
        moved = torch.stack([(p - before[n]).norm() for n, p in parameters(meta_layer).items()]).norm()
        assert float(moved) == pytest.approx(wanted, rel=1e-5)  # torch adds 1e-6 to the norm that it divides by
        assert float(metrics["meta_grad_norm"]) == pytest.approx(norm)


@pytest.mark.slow
def test_a_captured_step_clips_moves_and_reports_as_an_eager_one_and_refuses_what_is_not_finite():
    (eager, expected), (captured, found) = (
        (layer := maml(), outer_loop(layer, clip=0.1, capture=capture)) for capture in ("false", "true")
    )
    for seed in range(3):
        episode = episode_of(eager, seed=seed)
        torch.testing.assert_close(found.step(episode), expected.step(episode))
        torch.testing.assert_close(parameters(captured), parameters(eager))
    before, y = parameters(captured), episode.query.y.clone()
    y[1] = float("inf")
    with pytest.raises(NotFinite) as raised:
        found.step(episode._replace(query=episode.query._replace(y=y)))
    assert raised.value.tasks == [1]
    assert parameters(captured).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in parameters(captured).items())


def test_the_scheduler_steps_once_per_outer_step():
    outer = outer_loop(meta_layer := maml(), lr=0.1, gamma=0.5)
    for _ in range(3):
        outer.step(episode_of(meta_layer))
    assert outer.scheduler.get_last_lr() == [pytest.approx(0.1 * 0.5**3)]


def test_a_step_is_taken_in_training_mode():
    meta_layer = maml(test_inner_steps=7)
    episode = episode_of(meta_layer)
    losses, _ = meta_gradient(meta_layer, episode)
    metrics = outer_loop(meta_layer.eval()).step(episode)
    torch.testing.assert_close(metrics["query_loss"], losses.mean())


def test_a_loss_that_is_not_finite_names_its_tasks_and_moves_nothing():
    meta_layer = maml()
    before, episode = parameters(meta_layer), episode_of(meta_layer)
    y = episode.query.y.clone()
    y[1], y[4] = float("inf"), float("nan")
    outer = outer_loop(meta_layer, gamma=0.5, clip=1.0)
    with pytest.raises(NotFinite, match="the meta-loss is not finite") as raised:
        outer.step(episode._replace(query=episode.query._replace(y=y)))
    assert raised.value.tasks == [1, 4]
    assert raised.value.exit_code == 1
    assert all(torch.equal(p, before[name]) for name, p in parameters(meta_layer).items())
    assert outer.scheduler.get_last_lr() == [0.1]


def test_a_gradient_that_is_not_finite_stops_the_step_though_every_loss_is():
    meta_layer = maml()
    meta_layer.base_layer.head.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = parameters(meta_layer)
    with pytest.raises(NotFinite, match="the meta-gradient is not finite") as raised:
        outer_loop(meta_layer, clip=1.0).step(episode_of(meta_layer))
    assert raised.value.tasks == []
    assert all(torch.equal(p, before[name]) for name, p in parameters(meta_layer).items())


def test_a_meta_parameter_without_gradient_is_named():
    meta_layer = maml()
    meta_layer.register_parameter("forgotten", nn.Parameter(torch.zeros(2)))
    with pytest.raises(MissingGradient, match=r"no gradient reaches forgotten: .*frozen"):
        meta_gradient(meta_layer, episode_of(meta_layer))


def test_frozen_parameters_are_not_missed_and_stay():
    meta_layer = maml(frozen="^features")
    before = parameters(meta_layer)
    outer_loop(meta_layer).step(episode_of(meta_layer))
    moved = {name for name, p in parameters(meta_layer).items() if not torch.equal(p, before[name])}
    assert moved == {"base_layer.head.weight", "base_layer.head.bias"}


@pytest.mark.parametrize(("field", "value"), [("chunk", 0), ("chunk", -3), ("clip", 0.0), ("clip", -1.0)])
def test_settings_that_make_no_sense_are_refused(field, value):
    with pytest.raises(InvalidValue, match=f"^{field}={value}: must be"):
        outer_loop(maml(), **{field: value})


def sinusoid_loop(tasks=8, **settings):
    task = Sinusoid(k_shot=5, k_query=5)
    layer = MAML(
        MLP(task.spec, hidden=[16]).float(), task, update=partial(SGD, lr=0.01), meta_gradient=Exact(), inner_steps=4
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    outer = OuterLoop(layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0), **settings)
    drawn = task.sample(tasks, "train", torch.Generator().manual_seed(0))
    episode = Episode(*(Examples(*(leaf.float() for leaf in part)) for part in drawn))
    outer.prepare(episode)
    return outer, episode


def test_an_automatic_chunk_gives_the_meta_gradient_of_all_tasks_at_once():
    outer, episode = sinusoid_loop(chunk="auto")
    outer.step(episode)
    found = [p.grad for p in outer.meta_layer.parameters()]
    meta_gradient(outer.meta_layer, episode)
    torch.testing.assert_close(found, [p.grad for p in outer.meta_layer.parameters()])
    assert outer.planner.follow(episode) == outer.planner.follow(episode)


@pytest.mark.parametrize(
    ("tasks", "settings", "expected"),
    [
        (1, {}, ["loop by 1", "vectorised by 1"]),
        (8, {}, ["loop by 1", "vectorised by 1", "vectorised by 4", "loop by 8", "vectorised by 8"]),
        (17, {}, ["loop by 1", "vectorised by 1", "vectorised by 4", "vectorised by 16", "vectorised by 17"]),
        (8, {"memory_limit": 1.0}, ["loop by 1", "vectorised by 1", "vectorised by 4", "vectorised by 8"]),
        (8, {"capture": "auto"}, ["loop by 1", "vectorised by 1", "vectorised by 4", "vectorised by 8"]),
    ],
)
def test_an_automatic_chunk_tries_a_loop_over_all_tasks_where_they_are_few(monkeypatch, tasks, settings, expected):
    asked = []

    def last(candidates):
        asked.extend(candidates)
        return list(candidates)[-1]

    monkeypatch.setattr(plan_module, "fastest", last)
    outer, episode = sinusoid_loop(chunk="auto", tasks=tasks, **settings)
    assert outer.planner.follow(episode) == ExecutionPlan("vectorised", tasks)
    assert asked == expected


@pytest.mark.parametrize(
    ("tasks", "settings", "chunk"),
    [
        (8, {}, 8),
        (40, {}, 40),
        (8, {"engine": "loop"}, 8),
        (40, {"engine": "loop"}, 1),
        (8, {"engine": "loop", "memory_limit": 1.0}, 1),
        (8, {"engine": "loop", "capture": "auto"}, 1),
    ],
)
def test_by_rule_all_tasks_are_taken_at_once_and_a_loop_takes_all_of_a_few(monkeypatch, tasks, settings, chunk):
    monkeypatch.delattr(plan_module, "fastest")  # no stopwatch is asked
    outer, episode = sinusoid_loop(tasks=tasks, **settings)
    assert outer.planner.follow(episode) == ExecutionPlan(settings.get("engine", "vectorised"), chunk)


def test_compiled_steps_take_as_many_tasks_as_have_their_tensors_near_in_parts_of_one_shape(monkeypatch):
    meta_layer = maml()
    episode = episode_of(meta_layer)
    outer = outer_loop(meta_layer, capture="true")
    alone = outer.planner.peak(ExecutionPlan("vectorised", None), episode.tasks(slice(1))) / meta_layer.inner_steps
    for near, chunk in [(1.0, 1), (2.5 * alone, 2), (4.5 * alone, 3), (1e12, 6)]:
        monkeypatch.setattr(plan_module, "CACHE_BYTES", near)
        assert outer.planner.by_rule(episode) == ExecutionPlan("vectorised", chunk)


def test_a_memory_limit_bounds_the_tasks_at_a_time_and_what_is_predicted_comes_about(caplog):
    unlimited, episode = sinusoid_loop(tasks=32)
    whole = unlimited.planner.peak(ExecutionPlan("vectorised", None), episode)
    outer, _ = sinusoid_loop(tasks=32, memory_limit=whole / 4e9)
    with caplog.at_level(logging.INFO):
        plan = outer.planner.follow(episode)
    assert plan.chunk is not None and 1 <= plan.chunk < 32
    assert outer.planner.peak(plan, episode) <= 1.1 * whole / 4
    assert "predicted" in caplog.text and "measured" in caplog.text


def test_where_a_single_task_takes_too_much_inner_steps_are_checkpointed(caplog):
    outer, episode = sinusoid_loop(memory_limit=1e-9)
    with caplog.at_level(logging.INFO):
        plan = outer.planner.follow(episode)
    assert outer.meta_layer.checkpoint_steps and plan.chunk == 1
    assert "it is taken alone" in caplog.text


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"chunk": "some"}, "or null for a choice by rule, or auto"),
        ({"memory_limit": 0}, "must be above 0 GB"),
        ({"chunk": 4, "memory_limit": 1.0}, "chunk=4 is given as well: leave one out"),
    ],
)
def test_wrong_memory_settings_say_what_would_be_right(settings, why):
    with pytest.raises(InvalidValue, match=why):
        sinusoid_loop(**settings)
