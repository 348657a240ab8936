"""ProtoMAML against the prototypical network, a plain loop over tasks, and finite differences."""

from functools import partial

import pytest
import torch
from test_meta_gradients import NETWORKS, episode_of, images
from torch import nn
from torch.func import functional_call

from mlframework.base_layers import MLP, BaseLayer
from mlframework.errors import IncompatibleKind, InvalidValue
from mlframework.inner_loop import SGD, Adam, LearnedRates
from mlframework.meta_layers import Exact, Prototypes
from mlframework.meta_layers.gradient_descent.proto_maml import ProtoMAML
from mlframework.runs import build
from mlframework.runs.check_config import check_config
from mlframework.tasks import Sinusoid
from mlframework.testing import directional_errors
from mlframework.training.meta_gradient import meta_gradient

pytestmark = pytest.mark.usefixtures("float64")


def proto_maml(network, task, **settings):
    settings = {"update": partial(SGD, lr=0.05), "meta_gradient": Exact(), "inner_steps": 2, **settings}
    return ProtoMAML(network, task, **settings)


@pytest.mark.parametrize("network", NETWORKS)
def test_before_any_step_it_is_the_prototypical_network(network):
    """Its logits differ from minus the squared distances by what all classes share."""
    side, make = NETWORKS[network]
    task = images(side)
    base_layer, episode = make(task.spec), episode_of(task)
    meta_layer = proto_maml(base_layer, task)
    logits = meta_layer.predict(meta_layer.initial(episode.support), episode.query.x)
    prototypes = Prototypes(base_layer, task, batch_norm="transductive")
    distances = prototypes.predict(prototypes.adapt(episode.support), episode.query.x)
    torch.testing.assert_close(logits.log_softmax(-1), distances.log_softmax(-1), rtol=1e-9, atol=1e-9)


RULES = {"sgd": partial(SGD, lr=0.05), "rates": partial(LearnedRates, lr=0.05), "adam": partial(Adam, lr=0.005)}


@pytest.mark.parametrize("adapts", [".", "^head"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_meta_gradient_equals_finite_differences(network, rule, adapts):
    """That of the features, through the prototypes as well."""
    side, make = NETWORKS[network]
    task = images(side)
    meta_layer = proto_maml(make(task.spec), task, adapts=adapts, update=RULES[rule])
    assert directional_errors(meta_layer, episode_of(task), directions=2).max() < 1e-6


def test_it_equals_a_plain_loop_over_tasks():
    task = images(8)
    network = MLP(task.spec, hidden=[7])
    meta_layer = proto_maml(network, task)
    episode = episode_of(task, num_tasks=3)
    losses, _ = meta_gradient(meta_layer, episode)
    initial = {name: p for name, p in network.named_parameters() if not name.startswith("head")}
    wanted = []
    for number in range(3):
        (x, y), (query_x, query_y) = ((part.x[number], part.y[number]) for part in episode)
        means = torch.stack([network.features(x)[y == label].mean(0) for label in range(3)])
        # Copies, so that an inner gradient by the features is not also one through the head that they give.
        params = {name: p.clone() for name, p in initial.items()}
        params |= {"head.weight": 2 * means, "head.bias": -means.square().sum(1)}
        for _ in range(2):
            loss = task.loss(functional_call(network, params, (x,)), y).mean()
            steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - 0.05 * step for (name, p), step in zip(params.items(), steps, strict=True)}
        wanted.append(task.loss(functional_call(network, params, (query_x,)), query_y).mean())
    wanted = torch.stack(wanted)
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-12, atol=0)
    for p, gradient in zip(initial.values(), torch.autograd.grad(wanted.mean(), list(initial.values())), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_the_learned_head_takes_no_part():
    task = images(8)
    network = MLP(task.spec, hidden=[7])
    meta_layer, episode = proto_maml(network, task), episode_of(task)
    before, _ = meta_gradient(meta_layer, episode)
    assert not [name for name, p in meta_layer.named_parameters() if p.requires_grad and "head" in name]
    with torch.no_grad():
        network.head.weight.fill_(7.0)
    after, _ = meta_gradient(meta_layer, episode)
    assert torch.equal(before, after)


def test_what_has_no_head_to_start_is_refused_in_one_line():
    task = images(8)
    with pytest.raises(InvalidValue, match="adapts=\\^features: must take in the head"):
        proto_maml(MLP(task.spec, hidden=[7]), task, adapts="^features")
    for head in (nn.Linear(64, 3, bias=False), nn.Sequential(nn.Linear(64, 3))):
        with pytest.raises(InvalidValue, match="must be a linear layer with biases"):
            proto_maml(BaseLayer(nn.Flatten(), head), task)
    with pytest.raises(IncompatibleKind, match="ProtoMAML takes classification tasks"):
        proto_maml(MLP(Sinusoid().spec), Sinusoid())


def test_its_settings_are_checked_as_those_of_maml():
    from test_contracts import small

    config = small("algorithm=proto_maml", "task=digits", "+algorithm.inner_step=3")
    with pytest.raises(InvalidValue, match=r"algorithm.inner_step=3: ProtoMAML has no such setting .*inner_steps"):
        check_config(config, settings={})
    assert build.build_task(config).spec.kind == "classification"
