"""Networks over sequences: causal, blind to padding, exactly differentiable twice, and readable in parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mlframework.base_layers import GRU, BaseLayer, Transformer
from mlframework.base_layers.recall import recalled, recalling
from mlframework.base_layers.transformer import RMSNorm, angles, later, least, rotations, turned
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue, UserError
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import TaskDistribution
from mlframework.testing import check_meta_layer, directional_errors

VOCABULARY, LENGTH = 7, 6
SPEC = TaskSpec("sequence", (LENGTH,), VOCABULARY)

pytestmark = pytest.mark.usefixtures("float64")

NETWORKS = {
    "transformer": partial(Transformer, width=8, depth=2, heads=2),
    "transformer with learned positions": partial(Transformer, width=8, depth=2, heads=2, positions="learned"),
    "gru": partial(GRU, width=5),
    "gru of two layers": partial(GRU, width=4, layers=2),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


class Walks(TaskDistribution):
    """Random tokens in rows of unequal length; the next token is the target."""

    spec = SPEC

    def sample(self, num_tasks, split, generator):
        tokens = torch.randint(VOCABULARY, (num_tasks, 5, LENGTH + 1), generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (num_tasks, 5, 1), generator=generator)
        examples = Examples(tokens[..., :-1], tokens[..., 1:], (torch.arange(LENGTH) < lengths).float())
        return Episode(examples.rows(slice(3)), examples.rows(slice(3, None)))


def maml(make, task):
    return MAML(make(task.spec), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2)


def sequences(rows=3, length=LENGTH):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@every_network
def test_a_meta_layer_through_it_keeps_the_contract_padding_included(make):
    check_meta_layer(partial(maml, make), Walks(), num_tasks=2)


@every_network
def test_second_order_meta_gradients_equal_finite_differences(make):
    meta_layer = maml(make, Walks()).double()
    with torch.no_grad():
        for parameter in meta_layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # nothing is near zero, where a mistake would hide
    episode = Walks().sample(2, "train", torch.Generator().manual_seed(0))
    episode = Episode(*(part._replace(mask=part.mask.double()) for part in episode))
    assert directional_errors(meta_layer, episode).max() < 1e-6


@every_network
def test_a_later_token_changes_no_earlier_prediction(make):
    network, x = make(SPEC), sequences()
    changed = x.clone()
    changed[:, 3] = (x[:, 3] + 1) % VOCABULARY
    before, after = network(x), network(changed)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-12)
    assert (after[:, 3:] - before[:, 3:]).abs().amax((0, 2)).min() > 1e-9


@every_network
def test_what_a_mask_leaves_out_might_as_well_not_be_there(make):
    network, x = make(SPEC), sequences()
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]]).expand(3, -1).double()
    found = network(x, mask)[:, mask[0] > 0]
    torch.testing.assert_close(found, network(x[:, mask[0] > 0]), rtol=0, atol=1e-12)


@every_network
def test_masks_of_ones_change_nothing(make):
    network, x = make(SPEC), sequences()
    torch.testing.assert_close(network(x, torch.ones(3, LENGTH)), network(x), rtol=0, atol=1e-12)


@every_network
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1), (4, 1, 1), (2, 4), (6,)])
def test_a_sequence_read_in_parts_gives_what_it_gives_as_a_whole(make, cuts):
    network, x = make(SPEC), sequences()
    params = {name: p + 0.1 for name, p in network.named_parameters()}
    whole = torch.func.functional_call(network, params, (x,))
    with recalling(network):
        parts = [torch.func.functional_call(network, params, (part,)) for part in x.split(cuts, dim=1)]
        assert recalled(network)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


@every_network
def test_parts_may_be_padded(make):
    network, x = make(SPEC), sequences()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0]]).expand(3, -1).double()
    with recalling(network):
        network(x[:, :4], mask[:, :4])
        found = network(x[:, 5:])
    torch.testing.assert_close(found[:, 0], network(x[:, [0, 1, 3, 5]])[:, -1], rtol=0, atol=1e-12)


@every_network
def test_after_reading_in_parts_everything_is_forgotten(make):
    network, x = make(SPEC), sequences()
    fresh, keys = network(x), set(network.state_dict())

    def fail():
        with recalling(network):
            network(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not recalled(network)
    torch.testing.assert_close(network(x), fresh, rtol=0, atol=0)
    assert set(network.state_dict()) == keys


@every_network
def test_two_sequences_at_once_are_refused_and_the_first_goes_on(make):
    network, x = make(SPEC), sequences()
    whole = network(x)
    with recalling(network):
        network(x[:, :2])
        with pytest.raises(RuntimeError, match="recalling already"), recalling(network):
            pass
        torch.testing.assert_close(network(x[:, 2:]), whole[:, 2:], rtol=0, atol=1e-12)


def test_a_network_that_remembers_nothing_is_not_read_in_parts():
    network = BaseLayer(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    with pytest.raises(UserError, match="BaseLayer reads no sequence in parts"), recalling(network):
        pass


def test_rotary_products_tell_the_distance_alone():
    query, key = torch.randn(1, 1, 9, 4)[:, :, :1].expand(-1, -1, 9, -1), torch.randn(1, 1, 1, 4).expand(-1, -1, 9, -1)
    turns = angles(key, None)
    products = (turned(query, *turns) @ turned(key, *turns).mT)[0, 0]
    for distance in range(9):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert products.diagonal(-1)[0] != products.diagonal(-2)[0]


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmapped"])
def test_turning_keeps_lengths_and_has_the_derivatives_of_finite_differences(batched):
    x, turns = torch.randn(2, 3, 6).requires_grad_(), rotations(torch.zeros(6), 3, 6, 100.0)
    function = torch.func.vmap(lambda x: turned(x, *turns)) if batched else lambda x: turned(x, *turns)
    torch.testing.assert_close(function(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_rotations_are_cosines_and_sines_of_positions_times_rates():
    cosines, sines = rotations(torch.zeros(()), 5, 6, 100.0)
    angles = torch.tensor([[p * 100.0 ** (-2 * i / 6) for i in range(3)] for p in range(5)])
    torch.testing.assert_close(cosines, angles.cos())
    torch.testing.assert_close(sines, angles.sin())


def test_a_table_is_the_callers_own():
    later(torch.zeros(1), 3, 3).fill_(1.0)
    assert (later(torch.zeros(1), 3, 3).diagonal() == 0).all()


def test_a_compiler_sees_a_table_as_one_operation():
    graph = make_fx(lambda x: x + later(x, 3, 3), tracing_mode="fake")(torch.zeros(3, 3))
    assert not any("triu" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(torch.ones(3, 3)), 1 + later(torch.zeros(1), 3, 3))


def test_what_is_hidden_twice_has_no_weight_and_a_softmax():
    hidden = later(torch.zeros(1), 2, 4)
    assert (hidden == 0).tolist() == [[True, True, True, False], [True] * 4]
    assert (hidden.softmax(-1)[0, 3] == 0).item()
    assert torch.isfinite((hidden + least(hidden.dtype)).softmax(-1)).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e3])
def test_derivatives_of_a_norm_far_out_are_numbers(size):
    x = torch.full((2, 4), size, dtype=torch.float32, requires_grad=True)
    once = torch.autograd.grad(RMSNorm(4).float()(x).sum(), x, create_graph=True)[0]
    twice = torch.autograd.grad(once.sum(), x)[0]
    assert torch.isfinite(once).all()
    assert torch.isfinite(twice).all()


def test_gated_units_are_those_of_torch():
    ours, theirs = GRU(SPEC, width=5, layers=2), nn.GRU(5, 5, num_layers=2, batch_first=True)
    with torch.no_grad():
        for layer, units in enumerate(ours.features[1:]):
            for name, linear in {"ih": units.from_input, "hh": units.from_state}.items():
                getattr(theirs, f"weight_{name}_l{layer}").copy_(linear.weight)
                getattr(theirs, f"bias_{name}_l{layer}").copy_(linear.bias)
    x = sequences()
    torch.testing.assert_close(ours.features(x), theirs(ours.features[0](x))[0])


def test_learned_positions_end_where_the_task_does():
    network = Transformer(SPEC, width=8, depth=1, heads=2, positions="learned")
    with pytest.raises(InvalidValue, match="positions=learned: knows 6 positions, and this sequence has 8: use rotary"):
        network(sequences(length=8))
    with recalling(network):
        network(sequences())
        with pytest.raises(InvalidValue, match="use rotary"):
            network(sequences())


def test_rotary_positions_have_no_end():
    network = Transformer(SPEC, width=8, depth=1, heads=2)
    assert network(sequences(length=50)).shape == (3, 50, VOCABULARY)


@pytest.mark.parametrize("make", [Transformer, GRU])
def test_other_kinds_of_task_are_refused_with_the_layer_for_them(make):
    with pytest.raises(IncompatibleTask, match=r"reads sequences of tokens, this task is a regression: use .*=mlp"):
        make(TaskSpec("regression", (1,), 1))
    with pytest.raises(IncompatibleTask, match="use base_layer=conv4"):
        make(TaskSpec("classification", (1, 28, 28), 5))


@pytest.mark.parametrize(
    ("make", "setting", "line"),
    [
        (Transformer, {"heads": 3}, "heads=3: must divide width=64"),
        (Transformer, {"depth": 0}, "depth=0: must be at least 1"),
        (Transformer, {"positions": "sinus"}, "positions=sinus: must be rotary or learned"),
        (GRU, {"width": 0}, "width=0: must be at least 1"),
    ],
)
def test_what_makes_no_network_is_refused(make, setting, line):
    with pytest.raises(InvalidValue, match=line):
        make(SPEC, **setting)
