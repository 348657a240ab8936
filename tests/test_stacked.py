"""Common layers with parameters of each task give what vmap gives, in values and in meta-gradients."""

from functools import partial

import pytest
import torch
from torch import nn

from mlframework.backend import stacked
from mlframework.backend.engine import over_tasks
from mlframework.backend.products import product
from mlframework.backend.tracing import while_traced
from mlframework.base_layers import MLP, BaseLayer, Conv4, Stack, Transformer
from mlframework.base_layers.transformer import Block
from mlframework.episode import TaskSpec
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid
from mlframework.training.meta_gradient import meta_gradient


def random_params(module, tasks, names):
    generator = torch.Generator().manual_seed(0)
    params = dict(module.named_parameters())
    return {name: torch.randn(tasks, *params[name].shape, generator=generator) for name in names}


BASES = {
    "mlp": (lambda: MLP(TaskSpec("regression", (2, 3), 4), hidden=[5, 6]), (3, 7, 2, 3)),
    "no bias": (lambda: BaseLayer(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh()), nn.Linear(4, 2)), (3, 7, 3)),
    "positions": (lambda: BaseLayer(Stack(nn.Linear(3, 4), nn.SiLU()), nn.Linear(4, 2)), (3, 7, 5, 3)),
}


@pytest.mark.parametrize("adapts", ["", "features", "head", "weight", "bias"])
@pytest.mark.parametrize("name", BASES)
def test_values_are_those_of_vmap_whatever_is_stacked(name, adapts):
    make, size = BASES[name]
    base, x = make(), torch.randn(size)
    params = random_params(base, 3, [name for name, _ in base.named_parameters() if adapts in name])
    assert stacked.supports(base, x)
    expected = over_tasks(lambda p, x: torch.func.functional_call(base, p, (x,)), params, x, engine="vectorised")
    torch.testing.assert_close(stacked.forward(base, params, x), expected)


@pytest.mark.parametrize("adapts", ["", "0.0", "0.1", "head", "bias"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("downsample", ["stride", "pool"])
def test_convolutional_networks_are_those_of_vmap_whatever_is_stacked_and_masked(downsample, norm, masked, adapts):
    base = Conv4(TaskSpec("classification", (1, 16, 16), 5), filters=8, downsample=downsample, norm=norm).double()
    x = torch.randn(3, 4, 1, 16, 16, dtype=torch.float64)
    params = random_params(base, 3, [name for name, _ in base.named_parameters() if adapts in name])
    params = {name: p.double() for name, p in params.items()}
    inputs = (x, torch.tensor([1.0, 1, 0, 1]).expand(3, 4)) if masked else (x,)
    assert stacked.supports(base, x)
    expected = over_tasks(lambda p, *i: torch.func.functional_call(base, p, i), params, *inputs, engine="vectorised")
    torch.testing.assert_close(stacked.forward(base, params, *inputs), expected)
    with while_traced():
        torch.testing.assert_close(stacked.forward(base, params, *inputs), expected)


TEXT = TaskSpec("sequence", (6,), 7)


@pytest.mark.parametrize("adapts", ["", "embedding", "norm", "query", "contract", "head"])
@pytest.mark.parametrize("masked", [False, True])
def test_transformers_are_those_of_vmap_whatever_is_stacked_and_masked(adapts, masked):
    base, generator = Transformer(TEXT, width=8, depth=2, heads=2), torch.Generator().manual_seed(0)
    x = torch.randint(7, (3, 4, 6), generator=generator)
    mask = (torch.rand(3, 4, 6, generator=generator) < 0.7).float() if masked else None
    params = random_params(base, 3, [name for name, _ in base.named_parameters() if adapts in name])
    assert stacked.supports(base, x)
    inputs = (x,) if mask is None else (x, mask)
    expected = over_tasks(lambda p, *i: torch.func.functional_call(base, p, i), params, *inputs, engine="vectorised")
    found = stacked.forward(base, params, x, mask)
    counts = slice(None) if mask is None else mask > 0
    torch.testing.assert_close(found[counts], expected[counts])


def test_transformers_that_are_not_as_they_are_written_are_left_to_vmap():
    x = torch.zeros(2, 3, 6, dtype=torch.long)
    assert not stacked.supports(Transformer(TEXT, width=8, heads=2, positions="learned"), x)

    class Other(Block):
        def forward(self, x, mask=None):
            return x

    base = Transformer(TEXT, width=8, depth=1, heads=2)
    base.features.block0 = Other(8, 2, rotary=True, depth=1)
    assert not stacked.supports(base, x)


def test_what_is_unknown_or_hung_with_hooks_or_flattens_otherwise_is_left_to_vmap():
    x = torch.zeros(2, 3, 4)
    for convolution in (nn.Conv2d(1, 2, 3, dilation=2), nn.Conv2d(1, 2, 3, padding="same")):
        base = BaseLayer(nn.Sequential(convolution, nn.Flatten()), nn.Linear(32, 2))
        assert not stacked.supports(base, torch.zeros(2, 3, 1, 8, 8))
    assert not stacked.supports(BaseLayer(nn.Flatten(0), nn.Linear(4, 2)), x)
    hooked = BaseLayer(nn.Linear(4, 4), nn.Linear(4, 2))
    hooked.head.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not stacked.supports(hooked, x)
    hooked = BaseLayer(nn.Linear(4, 4), nn.Linear(4, 2))
    hooked.head.register_full_backward_pre_hook(lambda module, grads: None)
    assert not stacked.supports(hooked, x)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not stacked.supports(BaseLayer(Doubled(4, 4), nn.Linear(4, 2)), x)


class Averaged(nn.Linear):
    """A weight that is no matrix: as many of them as there are tasks."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.randn(2, outputs, inputs))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.mean(0), self.bias)


def test_weights_of_linear_layers_need_not_be_matrices():
    task = Sinusoid(k_shot=4, k_query=3)
    base = BaseLayer(nn.Linear(1, 5), Averaged(5, 1))
    layer = MAML(base, task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2)
    episode = task.sample(2, "train", torch.Generator().manual_seed(0))
    assert layer.initial(episode.support)["head.weight"].shape == (2, 2, 1, 5)
    found = {}
    for engine in ("vectorised", "loop"):
        layer.engine = engine
        found[engine], _ = layer.meta_loss(episode)
    torch.testing.assert_close(found["vectorised"], found["loop"])


def test_hooks_on_all_modules_see_every_call():
    base = BaseLayer(nn.ReLU(), nn.Linear(4, 2))
    seen = []
    assert stacked.supports(base, torch.zeros(2, 3, 4))
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        assert not stacked.supports(base, torch.zeros(2, 3, 4))
        task = Sinusoid(k_shot=4, k_query=3)
        layer = MAML(
            MLP(task.spec, hidden=[6]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2
        )
        layer.meta_loss(task.sample(3, "train", torch.Generator().manual_seed(0)))
    finally:
        handle.remove()
    linear = [module for module in seen if isinstance(module, nn.Linear)]
    assert len(linear) == 3 * 2  # in two inner steps and the query pass, each of two layers
    assert stacked.supports(base, torch.zeros(2, 3, 4))


def test_meta_gradients_are_those_of_the_loop():
    task = Sinusoid(k_shot=4, k_query=3)
    layer = MAML(MLP(task.spec, hidden=[6]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2)
    episode = task.sample(3, "train", torch.Generator().manual_seed(0))
    found = {}
    for engine in ("vectorised", "loop"):
        layer.engine = engine
        meta_gradient(layer, episode)
        found[engine] = {name: p.grad for name, p in layer.named_parameters()}
    torch.testing.assert_close(found["vectorised"], found["loop"])


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_compiled_steps_are_exact_to_the_second_order(transposed):
    a = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def of_factors(a, b):
        return product(a, b.mT.contiguous().mT if transposed else b)

    torch.testing.assert_close(of_factors(a, b), a @ b.mT)
    assert torch.autograd.gradcheck(of_factors, (a, b))
    assert torch.autograd.gradgradcheck(of_factors, (a, b))


def test_a_layer_with_parts_runs_under_vmap_beside_others():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.a(x))

    module, x = Twice(), torch.randn(2, 4, 3)
    params = {"a.weight": torch.randn(2, 3, 3), "a.bias": module.a.bias}
    found = stacked.by_vmap(module, params, x)
    expected = [
        torch.func.functional_call(module, {"a.weight": params["a.weight"][i], "a.bias": module.a.bias}, x[i])
        for i in range(2)
    ]
    torch.testing.assert_close(found, torch.stack(expected))
