"""The outer step as one compiled graph gives what the eager step gives; what cannot be one says so and goes on."""

import logging
from functools import partial

import pytest
import torch

from mlframework.base_layers import MLP
from mlframework.capture import Capture
from mlframework.compiled import WholeStep, eager_gradients
from mlframework.errors import InvalidValue
from mlframework.inner_updates import SGD
from mlframework.meta_layers.gradient_descent import MAML, AnnealedOrder, Exact
from mlframework.outer_loop import meta_gradient
from mlframework.tasks import Sinusoid


def maml(gradient):
    task = Sinusoid(k_shot=3, k_query=3)
    return MAML(MLP(task.spec, hidden=[8]), task, update=partial(SGD, lr=0.1), meta_gradient=gradient, inner_steps=1)


def episode_of(layer, seed=0):
    return layer.task.sample(4, "train", torch.Generator().manual_seed(seed))


def test_captured_and_eager_agree_as_the_parameters_move():
    layer = maml(Exact())
    capture = Capture(layer, "true")
    for seed in range(5):
        episode = episode_of(layer, seed)
        losses, _ = meta_gradient(layer, episode, chunk=2, gradients_of=capture)
        found = {name: p.grad for name, p in layer.named_parameters()}
        expected, _ = meta_gradient(layer, episode)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(found, {name: p.grad for name, p in layer.named_parameters()})
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.1 * p.grad
    assert [type(way) for way in capture.ways.values()] == [WholeStep]


def test_what_changes_with_the_outer_step_is_refused_in_one_line_and_goes_on(caplog):
    layer = maml(AnnealedOrder(5))
    capture, episode = Capture(layer, "true"), episode_of(layer)
    with caplog.at_level(logging.WARNING):
        found = [capture(episode) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "capture: eager steps instead: MAML changes with the number of the outer step"
    ]
    for gradients in found:
        torch.testing.assert_close(gradients.by_name, eager_gradients(layer, episode).by_name)


def test_auto_stays_eager_where_the_run_is_too_short_to_gain():
    layer = maml(Exact())
    capture, episode = Capture(layer, "auto"), episode_of(layer)
    capture.steps_left = 10
    for _ in range(10):
        capture(episode)
    assert not capture.ways


def test_another_word_names_the_right_ones():
    with pytest.raises(InvalidValue, match="must be one of auto, true, false"):
        Capture(maml(Exact()), "yes")
