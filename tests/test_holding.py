"""What a module holds under two names is one parameter to every engine, compiled or not, and stays the module's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlframework.backend import capture as capture_module
from mlframework.backend.capture import Capture
from mlframework.base_layers import MLP
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid
from mlframework.testing import in_float64
from mlframework.training.meta_gradient import meta_gradient

LR, STEPS = 0.01, 2


def tied_by_module(base_layer):
    """A layer that is used twice."""
    names = [name for name, module in base_layer.named_modules() if isinstance(module, nn.Linear)]
    base_layer.set_submodule(names[2], base_layer.get_submodule(names[1]))


def tied_by_parameter(base_layer):
    """Two layers with the same weight, and biases of their own."""
    first, second = [module for module in base_layer.modules() if isinstance(module, nn.Linear)][1:3]
    second.weight = first.weight


def tied_in_both_ways(base_layer):
    """A layer that is used twice, and a third time with a bias of its own."""
    tied_by_module(base_layer)
    tied_by_parameter(base_layer)


TIES = [tied_by_module, tied_by_parameter, tied_in_both_ways]


def tied_maml(tie):
    torch.manual_seed(0)
    task = Sinusoid(k_shot=5, k_query=5)
    base_layer = MLP(task.spec, hidden=[8] * (4 if tie is tied_in_both_ways else 3))
    tie(base_layer)
    layer = MAML(base_layer, task, update=partial(SGD, lr=LR), meta_gradient=Exact(), inner_steps=STEPS)
    return layer.double().train(), in_float64(task.sample(3, "train", torch.Generator().manual_seed(0)))


def by_hand(tie, layer, episode):
    """Each task's query loss, by a network that is written out."""
    own = dict(layer.base_layer.named_parameters())
    names = list(own)

    def network(params, x):
        w1, b1, w2, b2, *more, w4, b4 = (params[name] for name in names)
        b3 = more[0] if more else b2
        again = [(w2, b2)] if tie is tied_in_both_ways else []
        for weight, bias in ((w1, b1), (w2, b2), *again, (w2, b3)):
            x = F.relu(F.linear(x, weight, bias))
        return F.linear(x, w4, b4)

    losses = []
    for sx, sy, qx, qy in zip(*episode.support[:2], *episode.query[:2], strict=True):
        params = own
        for _ in range(STEPS):
            grads = torch.autograd.grad(F.mse_loss(network(params, sx), sy), list(params.values()), create_graph=True)
            params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(F.mse_loss(network(params, qx), qy))
    return torch.stack(losses)


@pytest.mark.parametrize("engine", ["vectorised", "loop"])
@pytest.mark.parametrize("tie", TIES)
def test_meta_gradients_are_those_of_a_network_that_is_written_out(tie, engine):
    layer, episode = tied_maml(tie)
    layer.engine = engine
    expected = by_hand(tie, layer, episode)
    wanted = torch.autograd.grad(expected.mean(), list(layer.parameters()))
    own = dict(layer.named_parameters())
    losses, _ = meta_gradient(layer, episode)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close([p.grad for p in layer.parameters()], list(wanted))
    assert all(p is own[name] for name, p in layer.named_parameters())


def test_a_parameter_is_meant_by_any_of_its_names():
    task = Sinusoid()
    base_layer = MLP(task.spec, hidden=[8, 8, 8])
    tied_by_parameter(base_layer)
    (first, second) = [name for name, p in base_layer.named_parameters(remove_duplicate=False) if p.shape == (8, 8)][:2]
    settings = {"update": partial(SGD, lr=LR), "meta_gradient": Exact(), "inner_steps": 1}
    layer = MAML(base_layer, task, adapts=second.removesuffix("weight"), **settings)
    assert layer.adapted_names == [first, second.replace("weight", "bias")]
    layer = MAML(base_layer, task, frozen=second, **settings)
    assert first not in layer.adapted_names


@pytest.mark.slow
@pytest.mark.parametrize("most", [capture_module.MOST_OPERATIONS, 0])
def test_captured_steps_too(monkeypatch, caplog, tmp_path, most):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(capture_module, "MOST_OPERATIONS", most)
    layer, episode = tied_maml(tied_in_both_ways)
    found = Capture(layer, "true")(episode)
    assert "eager steps instead" not in caplog.text
    torch.testing.assert_close(found.losses, by_hand(tied_in_both_ways, layer, episode).detach())
