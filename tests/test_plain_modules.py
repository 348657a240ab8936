"""Any module from inputs to predictions is a base layer, where an algorithm needs no features of its own."""

from functools import partial

import pytest
import torch
from torch import nn

from mlframework.base_layers import BaseLayer, BatchStatistics, TakesMask
from mlframework.base_layers.base_layer import as_base_layer
from mlframework.base_layers.check_base_layer import check_base_layer
from mlframework.errors import InvalidValue, UserError
from mlframework.inner_loop import SGD
from mlframework.meta_layers import (
    CAVIA,
    MAML,
    Exact,
    FirstOrder,
    LoRA,
    ParameterDifference,
    ProtoMAML,
    Prototypes,
    Shift,
)
from mlframework.tasks import Digits, Sinusoid
from mlframework.training.meta_gradient import meta_gradient

RULE = partial(SGD, lr=0.05)
WAYS = {"maml": Exact(), "fomaml": FirstOrder(), "reptile": ParameterDifference()}


class Vision(nn.Module):
    """Written as torchvision's networks are: parts by name, and a classifier called `fc`."""

    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def sequential():
    task = Sinusoid(k_shot=5, k_query=5)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), task


def vision():
    return Vision(2), Digits(n_way=2, k_shot=2, k_query=2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [sequential, vision])
def test_a_plain_module_trains(make, way):
    torch.manual_seed(0)
    module, task = make()
    check_base_layer(module, task.spec)
    layer = MAML(module, task, update=RULE, meta_gradient=WAYS[way], inner_steps=2)
    generator = torch.Generator().manual_seed(0)
    episode = task.sample(4, "train", generator)
    before = layer.query_metrics(layer.adapt(episode.support), episode)["query_loss"].mean().item()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(30):
        meta_gradient(layer, episode)
        optimizer.step()
    after = layer.query_metrics(layer.adapt(episode.support), episode)["query_loss"].mean().item()
    assert after < 0.9 * before


def test_the_meta_gradient_is_that_of_the_parts_in_a_base_layer():
    torch.manual_seed(0)
    module, task = sequential()
    parts = BaseLayer(nn.Sequential(module[0], module[1]), module[2])
    episode = task.sample(4, "train", torch.Generator().manual_seed(0))
    found = []
    for base_layer in (module, parts):
        layer = MAML(base_layer, task, update=RULE, meta_gradient=Exact(), inner_steps=2)
        meta_gradient(layer, episode)
        found.append([p.grad.clone() for p in module.parameters()])
    torch.testing.assert_close(*found)


def test_names_are_the_modules_own_behind_features():
    module, task = vision()
    settings = {"update": RULE, "meta_gradient": Exact(), "inner_steps": 1}
    assert MAML(module, task, adapts="fc", **settings).adapted_names == ["features.fc.weight", "features.fc.bias"]
    layer = MAML(module, task, adapts=r"bn1\.bias$", frozen="conv1", **settings)
    assert layer.adapted_names == ["features.bn1.bias"]
    assert not module.conv1.weight.requires_grad
    with pytest.raises(InvalidValue, match=r"matches no parameter; there are features\.conv1"):
        MAML(vision()[0], task, adapts="^head", **settings)


def test_low_rank_changes_and_contexts_find_their_layers():
    settings = {"update": RULE, "meta_gradient": Exact(), "inner_steps": 1}
    module, task = sequential()
    episode = task.sample(2, "train", torch.Generator().manual_seed(0))
    for layer in (
        LoRA(nn.Linear(1, 1), task, layers=".", rank=1, **settings),
        CAVIA(module, task, modulates="features.0", modulation=Shift, context_size=2, **settings),
    ):
        meta_gradient(layer, episode)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda module, task: Prototypes(module, task), "Prototypes"),
        (
            lambda module, task: ProtoMAML(module, task, update=RULE, meta_gradient=Exact(), inner_steps=1),
            "ProtoMAML",
        ),
    ],
)
def test_an_algorithm_that_works_on_features_says_so_when_it_is_built(make, name):
    with pytest.raises(UserError) as raised:
        make(*vision())
    assert str(raised.value) == f"{name} works on features: base_layer must be a BaseLayer(features, head)"


def test_a_wrong_shape_names_the_module():
    with pytest.raises(UserError, match=r"^base_layer \(Vision\): returns \(2, 3\) for two inputs"):
        check_base_layer(Vision(3), Digits(n_way=2, k_shot=2, k_query=2).spec)


def test_whatever_is_no_module_is_refused():
    task = Sinusoid()
    with pytest.raises(InvalidValue, match="must be a module from inputs"):
        MAML(torch.sin, task, update=RULE, meta_gradient=Exact(), inner_steps=1)


class Masked(nn.Module):
    """Takes the mask as a second argument, and is no `TakesMask`."""

    def __init__(self):
        super().__init__()
        self.norm = BatchStatistics(2)

    def forward(self, x, mask=None):
        return self.norm(x, mask)


class Announced(Masked, TakesMask):
    pass


class WithOption(nn.Module):
    def forward(self, x, scale=None):
        assert scale is None
        return x


@pytest.mark.parametrize("module", [Masked(), Announced()])
def test_a_module_whose_second_argument_is_the_mask_gets_it(module):
    x, mask = torch.randn(5, 2), torch.tensor([1.0, 1, 1, 0, 0])
    found = as_base_layer(module)(x, mask)[:3]
    torch.testing.assert_close(found, module.norm(x[:3]))


def test_a_module_with_another_second_argument_does_not_get_the_mask():
    x = torch.randn(5, 2)
    torch.testing.assert_close(as_base_layer(WithOption())(x, torch.ones(5)), x)
    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)  # its mask is another
    assert as_base_layer(attention)(torch.randn(3, 5, 4), torch.ones(3, 5)).shape == (3, 5, 4)
