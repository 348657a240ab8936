"""A compiled step that is wrong on some inputs is refused; one that differs as rounding makes gradients jump is not."""

from functools import partial

import pytest
import torch

from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.tracing import NotCapturable
from mlframework.backend.verify import TOLERANCES, differences, perturbed, verify_against_eager
from mlframework.base_layers import MLP
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid


@pytest.fixture
def layer():
    torch.manual_seed(0)
    task = Sinusoid(k_shot=3, k_query=3)
    return MAML(MLP(task.spec, hidden=[8]), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)


@pytest.fixture
def episode(layer):
    return layer.task.sample(4, "train", torch.Generator().manual_seed(0))


@pytest.fixture
def kinked(layer, episode):
    """A layer with rectifiers that stand between on and off for one example."""
    first = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    with torch.no_grad():
        first.bias.copy_(-(first.weight @ episode.support.x[0, 0]))
    return layer


def check(layer, way, episode):
    verify_against_eager(layer, way, eager_gradients, episode)


def scaled(found, factor):
    return found._replace(by_name={name: factor * grad for name, grad in found.by_name.items()})


def otherwise_rounded(layer, episode):
    with perturbed(layer, seed=99):
        return eager_gradients(layer, episode)


def test_the_eager_step_itself_agrees_and_parameters_stay_as_they_were(kinked, episode):
    before = [p.detach().clone() for p in kinked.parameters()]
    check(kinked, otherwise_rounded, episode)
    assert all(torch.equal(p, kept) for p, kept in zip(kinked.parameters(), before, strict=True))


@pytest.mark.parametrize("there", [True, False])
def test_what_is_wrong_on_some_inputs_only_is_refused(layer, episode, there):
    def wrong(layer, given):
        found = eager_gradients(layer, given)
        return scaled(found, 1.02) if torch.equal(given.query.x, episode.query.x) == there else found

    with pytest.raises(NotCapturable, match="off the eager ones"):
        check(layer, wrong, episode)


def test_losses_that_are_wrong_are_refused_although_gradients_agree(layer, episode):
    def wrong(layer, given):
        found = eager_gradients(layer, given)
        return found._replace(losses=found.losses * 1.001)

    with pytest.raises(NotCapturable):
        check(layer, wrong, episode)


def test_a_jump_by_rounding_is_no_difference(kinked, episode):
    off = differences(otherwise_rounded(kinked, episode), eager_gradients(kinked, episode))
    assert off[1] > 10 * TOLERANCES[torch.float32][1]
    check(kinked, otherwise_rounded, episode)


def test_a_fault_as_large_as_the_jumps_is_refused(kinked, episode):
    jumps = differences(otherwise_rounded(kinked, episode), eager_gradients(kinked, episode))[1]
    with pytest.raises(NotCapturable):
        check(kinked, lambda *given: scaled(eager_gradients(*given), 1 + jumps.item()), episode)


def test_what_nothing_can_tell_from_a_fault_is_refused(kinked, episode):
    with pytest.raises(NotCapturable, match="cannot be judged"):
        check(kinked, otherwise_rounded, episode.tasks(slice(1)))


def test_a_graph_with_other_gradients_is_refused(layer, episode):
    def fewer(layer, given):
        found = eager_gradients(layer, given)
        return found._replace(by_name=dict(list(found.by_name.items())[1:]))

    with pytest.raises(NotCapturable, match="other parameters"):
        check(layer, fewer, episode)
