"""Meta-gradients with parameters of each task are those of a loop over tasks, whatever adapts and however."""

from functools import partial

import pytest
import torch
from torch import nn

from mlframework.base_layers import MLP, BaseLayer, Stack
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.inner_loop import SGD, Adam
from mlframework.meta_layers import MAML, Exact, FirstOrder, ParameterDifference
from mlframework.tasks import TaskDistribution
from mlframework.training.meta_gradient import meta_gradient

pytestmark = pytest.mark.usefixtures("float64")


class Regression(TaskDistribution):
    def __init__(self, *x_shape: int, ragged: bool = False) -> None:
        self.spec = TaskSpec("regression", x_shape, 2, ragged=ragged)

    def sample(self, num_tasks, split, generator):
        def examples(n):
            x = torch.randn(num_tasks, n, *self.spec.x_shape, generator=generator, dtype=torch.float64)
            y = torch.randn(num_tasks, n, 2, generator=generator, dtype=torch.float64)
            mask = torch.ones(num_tasks, n, dtype=torch.float64)
            mask[0, -1] = 0 if self.spec.ragged else 1
            return Examples(x, y, mask)

        return Episode(examples(5), examples(4))


BASES = {
    "mlp": ((2, 3), lambda spec: MLP(spec, hidden=[5, 6])),
    "no bias": ((3,), lambda spec: BaseLayer(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh()), nn.Linear(4, 2))),
    "positions": ((5, 3), lambda spec: BaseLayer(Stack(nn.Linear(3, 4), nn.SiLU(), nn.Flatten()), nn.Linear(20, 2))),
}
WAYS = {
    "exact": {"meta_gradient": Exact(), "inner_steps": 1},
    "three steps": {"meta_gradient": Exact(), "inner_steps": 3},
    "checkpointed": {"meta_gradient": Exact(), "inner_steps": 2, "checkpoint_steps": True},
    "clipped": {"meta_gradient": Exact(), "inner_steps": 2, "inner_clip": 0.1, "inner_weight_decay": 0.1},
    "first order": {"meta_gradient": FirstOrder(), "inner_steps": 2},
    "reptile": {"meta_gradient": ParameterDifference(batch_size=3), "inner_steps": 2},
}
RULE = partial(SGD, lr=0.1)


def layer_of(name="mlp", *, ragged=False, update=RULE, make=None, **settings):
    torch.manual_seed(0)
    x_shape, base = BASES[name]
    task = Regression(*x_shape, ragged=ragged)
    settings = {**WAYS["exact"], **settings}
    layer = MAML((make or base)(task.spec), task, update=update, **settings).double()
    return layer, task.sample(3, "train", torch.Generator().manual_seed(0))


def same_as_by_the_loop(layer, episode):
    found = []
    for layer.engine in ("vectorised", "loop"):
        losses, _ = meta_gradient(layer, episode)
        found.append([losses, *(p.grad for p in layer.parameters() if p.requires_grad)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_meta_gradients_are_those_of_the_loop(name, way):
    layer, episode = layer_of(name, **WAYS[way])
    same_as_by_the_loop(layer, episode)


@pytest.mark.parametrize("adapts", ["features", "head", "weight", "bias"])
def test_whatever_adapts(adapts):
    layer, episode = layer_of(adapts=adapts, inner_steps=2)
    same_as_by_the_loop(layer, episode)


def test_with_padding_and_a_rule_with_a_memory():
    layer, episode = layer_of(ragged=True, update=partial(Adam, lr=0.1), inner_steps=2)
    same_as_by_the_loop(layer, episode)


def test_one_task():
    layer, episode = layer_of()
    same_as_by_the_loop(layer, episode.tasks(slice(1)))


def test_higher_derivatives_are_those_by_finite_differences():
    layer, episode = layer_of()
    weight = layer.base_layer.features[1].weight

    def slope(value):
        """The derivative of the meta-gradient's square."""
        with torch.no_grad():
            weight.copy_(value)
        losses, _ = layer.meta_loss(episode)
        (grad,) = torch.autograd.grad(losses.sum(), weight, create_graph=True)
        square = grad.square().sum()
        return square, torch.autograd.grad(square, weight)[0]

    start, direction = weight.detach().clone(), torch.randn_like(weight)
    _, found = slope(start)
    ahead, behind = (slope(start + sign * 1e-5 * direction)[0] for sign in (1, -1))
    torch.testing.assert_close((found * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)


def test_without_a_meta_gradient_and_with_frozen_parameters_it_adapts_all_the_same():
    layer, episode = layer_of()
    expected = layer.adapt(episode.support)
    with torch.no_grad():
        torch.testing.assert_close(layer.adapt(episode.support), expected)
    layer.requires_grad_(False)
    torch.testing.assert_close(layer.adapt(episode.support), expected)


def test_what_is_overwritten_keeps_its_gradient():
    same_as_by_the_loop(
        *layer_of(
            make=lambda spec: BaseLayer(Stack(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(inplace=True)), nn.Linear(4, 2))
        )
    )
