"""Modules of torch's own as base layers: each trains, is validated, saved and loaded as its documentation promises."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mlframework.base_layers import BaseLayer
from mlframework.errors import UserError
from mlframework.evaluation.task_set import judge_by_step
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, FirstOrder, Prototypes
from mlframework.tasks import Digits, Sinusoid
from mlframework.training.meta_gradient import MissingGradient, meta_gradient
from mlframework.training.outer_loop import OuterLoop

TASK = Sinusoid()


def episode(seed=0):
    return TASK.sample(2, "train", torch.Generator().manual_seed(seed))


def maml(features, head=None, *, meta_gradient=None, **settings):
    base_layer = BaseLayer(features, head or nn.Linear(8, 1))
    meta_gradient = meta_gradient or Exact()
    update = partial(SGD, lr=0.01)
    return MAML(base_layer, TASK, update=update, meta_gradient=meta_gradient, inner_steps=2, **settings)


def outer_loop(meta_layer, lr=0.05):
    optimizer = torch.optim.Adam([p for p in meta_layer.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return OuterLoop(meta_layer, optimizer, schedule)


# Spectral norm.


def normed():
    first, second = (parametrizations.spectral_norm(nn.Linear(size, 8)) for size in (1, 8))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh())


@pytest.mark.parametrize("meta_gradient", [Exact(), FirstOrder()])
def test_spectral_norm_keeps_the_largest_singular_value_at_one(meta_gradient):
    layer = maml(normed(), meta_gradient=meta_gradient)
    outer = outer_loop(layer)
    outer.prepare(episode())
    original = layer.base_layer.features[2].parametrizations.weight.original
    before = float(torch.linalg.matrix_norm(original.detach(), 2))
    for step in range(60):
        outer.step(episode(step))
    layer.eval()
    after = float(torch.linalg.matrix_norm(original.detach(), 2))
    assert abs(after / before - 1) > 0.2  # the weight has moved so far that buffers of the start would be wrong
    for linear in (layer.base_layer.features[0], layer.base_layer.features[2]):
        assert float(torch.linalg.matrix_norm(linear.weight.detach(), 2)) == pytest.approx(1, abs=0.05)


def test_adapting_leaves_the_buffers_of_spectral_norm_as_they_are():
    layer = maml(normed())
    layer.engine = "loop"
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    meta_gradient(layer, episode())
    judge_by_step(layer, episode(), 2)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


class RunningCentre(nn.Module):
    """Subtracts a running mean of all that it has met."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(x.mean(0), 0.1)
        return x - self.centre


def test_buffers_that_depend_on_inputs_are_refused():
    layer = maml(nn.Sequential(RunningCentre(), nn.Linear(1, 8), nn.Tanh()))
    with pytest.raises(
        UserError, match=r"^base_layer.features.0 \(RunningCentre\): its buffer centre depends on the in"
    ):
        outer_loop(layer).prepare(episode())


# Attention.


class Reads(nn.Module):
    """A number as three equal tokens, read by torch's own encoder layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.encoder(self.embed(x).unsqueeze(-2).expand(*x.shape[:-1], 3, 8)).mean(-2)


@pytest.mark.parametrize("meta_gradient", [Exact(), FirstOrder()])
@pytest.mark.parametrize("engine", ["vectorised", "loop"])
def test_torchs_encoder_layer_is_trained_and_judged_alike_in_both_engines(meta_gradient, engine, float64):
    layer = maml(Reads().double(), meta_gradient=meta_gradient).double()
    drawn = episode()
    drawn = drawn._replace(
        support=drawn.support._replace(x=drawn.support.x.double(), y=drawn.support.y.double()),
        query=drawn.query._replace(x=drawn.query.x.double(), y=drawn.query.y.double()),
    )
    layer.engine = engine
    losses, _ = meta_gradient_of(layer, drawn)
    judged = judge_by_step(layer, drawn, 2)["query_loss"][-1]  # without dropout both modes are the same function
    torch.testing.assert_close(losses, judged)
    assert torch.backends.mha.get_fastpath_enabled()


def meta_gradient_of(layer, drawn):
    layer.train()
    return meta_gradient(layer, drawn)


# Parameters that take no part.


class Spare(nn.Module):
    """A linear layer beside another that is never used."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(1, 8), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x).tanh()


def test_the_advice_for_a_parameter_that_takes_no_part_works():
    with pytest.raises(MissingGradient) as caught:
        meta_gradient(maml(Spare()), episode())
    pattern = str(caught.value).partition("algorithm.frozen='")[2].rstrip("'")
    meta_gradient(maml(Spare(), frozen=pattern), episode())


def test_a_base_layer_is_asked_for_features_and_a_head():
    with pytest.raises(
        UserError, match=r"Prototypes works on features: base_layer must be a BaseLayer\(features, head\)"
    ):
        Prototypes(nn.Linear(64, 2), Digits(n_way=2, k_shot=1, k_query=1))
