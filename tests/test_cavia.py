"""CAVIA against a network with concatenated inputs, a plain loop over tasks, and finite differences."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_meta_gradients import NETWORKS, episode_of, images
from torch import nn

from mlframework.base_layers import MLP, BaseLayer, Conv4
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, FirstOrder
from mlframework.meta_layers.gradient_descent.cavia import CAVIA, FiLM, Shift
from mlframework.tasks import Sinusoid
from mlframework.testing import directional_errors
from mlframework.training.meta_gradient import meta_gradient

pytestmark = pytest.mark.usefixtures("float64")


def cavia(base_layer, task, **settings):
    settings = {
        "modulates": "features.1",
        "modulation": Shift,
        "context_size": 3,
        "update": partial(SGD, lr=1.0),
        "meta_gradient": Exact(),
        "inner_steps": 2,
        **settings,
    }
    return CAVIA(base_layer, task, **settings)


@pytest.mark.parametrize("modulation", [Shift, FiLM])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_meta_gradient_equals_finite_differences(network, modulation):
    side, make = NETWORKS[network]
    task = images(side)
    meta_layer = cavia(make(task.spec), task, modulation=modulation)
    assert directional_errors(meta_layer, episode_of(task), directions=3).max() < 1e-6


def test_a_shift_behind_the_first_layer_is_the_context_concatenated_to_the_input():
    """The paper's regression, task after task: the context is part of the input, adapts from zero by its gradient,
    and the query loss is differentiated through that."""
    task = Sinusoid(k_shot=5, k_query=4)
    meta_layer = cavia(MLP(task.spec, hidden=[6, 6]), task)
    episode = episode_of(task, num_tasks=3)
    losses, _ = meta_gradient(meta_layer, episode)

    parameters = dict(meta_layer.base_layer.named_parameters())
    first = torch.cat([parameters["features.1.0.weight"], parameters["features.1.1.map.weight"]], dim=1)

    def loss(context, x, y):
        inputs = torch.cat([x, context.expand(len(x), -1)], dim=1)
        hidden = F.relu(F.linear(inputs, first, parameters["features.1.0.bias"]))
        hidden = F.relu(F.linear(hidden, parameters["features.4.weight"], parameters["features.4.bias"]))
        return (F.linear(hidden, parameters["head.weight"], parameters["head.bias"]) - y).square().mean()

    wanted = []
    for number in range(3):
        context = torch.zeros(3, requires_grad=True)
        for _ in range(2):
            (step,) = torch.autograd.grad(
                loss(context, episode.support.x[number], episode.support.y[number]), context, create_graph=True
            )
            context = context - step
        wanted.append(loss(context, episode.query.x[number], episode.query.y[number]))
    wanted = torch.stack(wanted)
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-12, atol=0)
    learned = {name: p for name, p in parameters.items() if p.requires_grad}
    assert parameters.keys() - learned.keys() == {"features.1.1.context"}
    for p, gradient in zip(learned.values(), torch.autograd.grad(wanted.mean(), list(learned.values())), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_film_scales_and_shifts_channels():
    film = FiLM(context_size=3, channels=4)
    x, images_of_x = torch.randn(5, 4), torch.randn(5, 4, 2, 2)
    assert torch.equal(film(x), x) and torch.equal(film(images_of_x), images_of_x)
    nn.init.normal_(film.context)
    scale, shift = film.map.weight[:4] @ film.context, film.map.weight[4:] @ film.context
    for channel in range(4):
        torch.testing.assert_close(film(x)[:, channel], x[:, channel] * (1 + scale[channel]) + shift[channel])
        torch.testing.assert_close(
            film(images_of_x)[:, channel], images_of_x[:, channel] * (1 + scale[channel]) + shift[channel]
        )


@pytest.mark.parametrize("modulation", [Shift, FiLM])
def test_the_context_alone_adapts_from_zero_where_the_network_is_as_it_was(modulation):
    task = images(16)
    network = Conv4(task.spec, filters=4)
    episode = episode_of(task)
    before = torch.stack([network(x) for x in episode.query.x])
    meta_layer = cavia(network, task, modulates="features.2", modulation=modulation, context_size=7)
    start, *_, end = meta_layer.trajectory(episode.support, 2)
    assert {name: tuple(p.shape) for name, p in end.items()} == {"features.2.1.context": (2, 7)}
    assert not start["features.2.1.context"].any()
    torch.testing.assert_close(meta_layer.predict(start, episode.query.x), before, rtol=1e-12, atol=1e-12)
    assert (end["features.2.1.context"][0] != end["features.2.1.context"][1]).all()


def test_an_outer_step_moves_the_network_and_the_map_and_leaves_the_context_at_zero():
    task = Sinusoid(k_shot=5, k_query=4)
    meta_layer = cavia(MLP(task.spec, hidden=[6, 6]), task)
    before = {name: p.detach().clone() for name, p in meta_layer.named_parameters()}
    meta_gradient(meta_layer, episode_of(task))
    torch.optim.SGD(meta_layer.parameters(), 0.1).step()
    stay = [name for name, p in meta_layer.named_parameters() if torch.equal(p, before[name])]
    assert stay == ["base_layer.features.1.1.context"]
    assert not meta_layer.get_parameter(stay[0]).any()


def test_the_first_order_gradient_is_another_than_the_exact_one():
    task = Sinusoid(k_shot=5, k_query=4)
    found = []
    for way in (Exact(), FirstOrder()):
        torch.manual_seed(0)
        meta_layer = cavia(MLP(task.spec, hidden=[6, 6]), task, meta_gradient=way)
        meta_gradient(meta_layer, episode_of(task))
        found.append(meta_layer.base_layer.get_parameter("features.1.1.map.weight").grad)
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            {"modulates": "features.11"},
            r"features.11: names no module \(did you mean .*; there are features, features.0",
        ),
        ({"modulates": "features.1", "context_size": 0}, "context_size=0: must be at least 1"),
    ],
)
def test_what_cannot_be_modulated_is_refused_in_one_line(setting, line):
    task = Sinusoid()
    with pytest.raises(InvalidValue, match=line):
        cavia(MLP(task.spec, hidden=[6]), task, **setting)


def test_a_module_that_puts_out_no_tensor_is_refused():
    class LastOfGRU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(1, 4, batch_first=True)

        def forward(self, x):
            return self.gru(x.unsqueeze(-1))[0][:, -1]

    task = Sinusoid()
    with pytest.raises(InvalidValue, match="must be a module that is called once, and puts out one tensor"):
        cavia(BaseLayer(LastOfGRU(), nn.Linear(4, 1)), task, modulates="features.gru")


def test_far_fewer_numbers_adapt_than_in_maml():
    task = Sinusoid()
    update = partial(SGD, lr=0.01)
    maml = MAML(MLP(task.spec), task, update=update, meta_gradient=Exact(), inner_steps=1)
    support = episode_of(task).support
    sizes = [sum(p[0].numel() for p in layer.adapt(support).values()) for layer in (maml, cavia(MLP(task.spec), task))]
    assert sizes == [1761, 3]
