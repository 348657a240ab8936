"""Base layers: batch statistics beside torch's, padding, and what the engine and the algorithms rely on."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlframework.base_layers import MLP, BaseLayer, BatchStatistics, Conv4, Stack
from mlframework.base_layers.normalisation import NORMS, norm_of
from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(8, 3), (8, 3, 5), (8, 3, 4, 6)]


def images(*shape, n_way=5):
    return TaskSpec("classification", shape, n_way)


def batch_statistics(channels=3):
    layer = BatchStatistics(channels)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    return layer


BASE_LAYERS = {
    **{f"mlp_{norm}": partial(MLP, hidden=[8, 8], norm=norm) for norm in NORMS},
    **{f"conv4_stride_{norm}": partial(Conv4, filters=4, norm=norm) for norm in NORMS},
    **{f"conv4_pool_{norm}": partial(Conv4, filters=4, norm=norm, downsample="pool") for norm in NORMS},
}


@pytest.fixture(params=BASE_LAYERS)
def base_layer(request):
    return BASE_LAYERS[request.param](images(1, 16, 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_statistics_are_those_of_torchs_batch_norm_in_training_mode(shape):
    x, layer = torch.randn(shape, requires_grad=True), batch_statistics()
    wanted = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    torch.testing.assert_close(layer(x), wanted)
    weight = torch.randn(shape)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (layer(x), wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_batch_statistics_are_differentiable_twice(masked):
    layer = batch_statistics(2)
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0]) if masked else None
    x = torch.randn(4, 2, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, mask), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), x)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_statistics_are_the_same_in_both_modes_and_keep_no_memory(mode):
    layer, x = batch_statistics(), torch.randn(8, 3)
    before = layer(x)
    getattr(layer, mode)()
    layer(torch.randn(8, 3) + 5)
    assert torch.equal(layer(x), before)
    assert not list(layer.buffers())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bool])
def test_masked_batch_statistics_are_those_of_the_rows_that_count(shape, kind):
    layer, x = batch_statistics(), torch.randn(shape)
    counts = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool()
    x[~counts] = 1e3
    torch.testing.assert_close(layer(x, counts.to(kind))[counts], layer(x[counts]))


def test_statistics_of_nothing_are_finite():
    assert batch_statistics()(torch.randn(4, 3), torch.zeros(4)).isfinite().all()


def test_padding_changes_no_prediction_that_counts(base_layer):
    x, counts = torch.rand(7, 1, 16, 16), torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    x[~counts] = 50
    torch.testing.assert_close(base_layer(x, counts.double())[counts], base_layer(x[counts]))


def test_a_mask_of_ones_is_no_mask(base_layer):
    x = torch.rand(7, 1, 16, 16)
    torch.testing.assert_close(base_layer(x, torch.ones(7)), base_layer(x))


def test_a_base_layer_mixes_examples_if_and_only_if_it_says_so(base_layer):
    x = torch.rand(6, 1, 16, 16)
    others = torch.cat([x[:1], torch.rand(5, 1, 16, 16)])
    mixes = not torch.allclose(base_layer(x)[0], base_layer(others)[0], rtol=1e-10, atol=1e-10)
    assert mixes == base_layer.mixes_examples


def test_native_batch_norm_is_known_to_mix_examples():
    assert BaseLayer(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)).mixes_examples
    assert not BaseLayer(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), nn.Linear(2, 2)).mixes_examples


def test_parameters_are_the_features_and_a_linear_head(base_layer):
    names = [name for name, _ in base_layer.named_parameters()]
    assert [name for name in names if not name.startswith("features.")] == ["head.weight", "head.bias"]
    x = torch.rand(4, 1, 16, 16)
    features = base_layer.features(x)
    assert features.shape == (4, base_layer.head.in_features)
    torch.testing.assert_close(base_layer(x), features @ base_layer.head.weight.T + base_layer.head.bias)


@pytest.mark.parametrize("downsample", ["stride", "pool"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84), (1, 17, 40), (2, 16, 16)])
def test_conv4_takes_images_of_any_size_and_number_of_channels(shape, downsample):
    assert Conv4(images(*shape), filters=4, downsample=downsample)(torch.rand(2, *shape)).shape == (2, 5)


def test_conv4_with_strides_takes_images_too_small_to_pool():
    assert Conv4(images(1, 8, 8), filters=4)(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(InvalidValue, match="images of 8x8 are too small for four poolings: use stride"):
        Conv4(images(1, 8, 8), downsample="pool")


def test_conv4_has_the_parameters_of_the_papers():
    """Finn et al. 2017: 64 filters on Omniglot, 32 on mini-ImageNet, where 84x84 pixels end as 5x5."""
    omniglot = 64 * 9 + 64 + 3 * (64 * 64 * 9 + 64) + 4 * 2 * 64 + 64 * 5 + 5
    assert sum(p.numel() for p in Conv4(images(1, 28, 28)).parameters()) == omniglot == 112_261
    mini_imagenet = 3 * 32 * 9 + 32 + 3 * (32 * 32 * 9 + 32) + 4 * 2 * 32 + 800 * 5 + 5
    assert sum(p.numel() for p in Conv4(images(3, 84, 84), filters=32, downsample="pool").parameters()) == mini_imagenet


def test_pooling_before_the_relu_gives_what_pooling_after_it_gives():
    base_layer, x = Conv4(images(1, 16, 16), filters=4, downsample="pool"), torch.rand(3, 1, 16, 16)
    usual = x
    for convolution, norm, *_ in list(base_layer.features)[:4]:
        usual = F.max_pool2d(F.relu(norm(convolution(usual))), 2)
    torch.testing.assert_close(base_layer.features(x), usual.flatten(1))


def test_an_mlp_is_its_layers_in_order():
    base_layer, x = MLP(images(1, 2, 2), hidden=[6, 3]), torch.rand(4, 1, 2, 2)
    first, second = (module for module in base_layer.features if isinstance(module, nn.Linear))
    wanted = base_layer.head(F.relu(second(F.relu(first(x.flatten(1))))))
    torch.testing.assert_close(base_layer(x), wanted)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (16, 2), (8, 1), (12, 1), (4, 1)])
def test_group_norm_has_groups_of_eight_or_one_group(channels, groups):
    assert norm_of("group", channels).num_groups == groups


def test_a_stack_hands_the_mask_to_those_inside_it_that_take_it():
    stack = Stack(nn.Identity(), Stack(BatchStatistics(3)), nn.Identity())
    x, mask = torch.randn(5, 3), torch.tensor([1.0, 1, 1, 0, 0])
    torch.testing.assert_close(stack(x, mask), stack[1][0](x, mask))
    assert not torch.allclose(stack(x, mask), stack(x))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (partial(Conv4, filters=0), "filters=0: must be at least 1"),
        (partial(Conv4, downsample="max"), "downsample=max: must be stride or pool"),
        (partial(Conv4, norm="bacth"), "norm=bacth: must be one of batch, group, none (did you mean batch?)"),
        (partial(MLP, norm="layer"), "norm=layer: must be one of batch, group, none"),
        (partial(MLP, hidden=[]), "hidden=[]: must name at least one layer, each at least 1 wide"),
        (partial(MLP, hidden=[4, 0]), "hidden=[4, 0]: must name at least one layer, each at least 1 wide"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make, line):
    with pytest.raises(InvalidValue) as raised:
        make(images(1, 28, 28))
    assert str(raised.value) == line


def test_conv4_on_inputs_that_are_no_images_names_a_base_layer_that_fits():
    with pytest.raises(IncompatibleTask, match="use base_layer=mlp"):
        Conv4(TaskSpec("regression", (1,), 1))
