"""Vectorised and loop do the same; which of them is chosen, and what the user reads of it."""

import logging
from functools import partial

import pytest
import torch
from reference import Recurrent
from torch import nn

from mlframework.backend.engine import choose_engine, over_tasks
from mlframework.base_layers import MLP, BaseLayer, Stack
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid
from mlframework.testing import directional_errors, in_float64
from mlframework.training.meta_gradient import meta_gradient


class DataDependent(nn.Module):
    """Looks at the values to decide what to compute."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    """Counts its calls in a buffer, which its output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Broken(nn.Module):
    """Has a mistake of its own."""

    def forward(self, x):
        raise ZeroDivisionError("a mistake in the module")


def maml_with(features, width=1, *, inner_steps=2):
    """MAML on sinusoids, with these features `[n, width]` before a linear head."""
    task = Sinusoid(k_shot=3, k_query=3)
    base_layer = BaseLayer(features, nn.Linear(width, 1))
    return MAML(base_layer, task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=inner_steps)


def episode_of(meta_layer, num_tasks=3):
    return meta_layer.task.sample(num_tasks, "train", torch.Generator().manual_seed(0))


REFUSED = {"gru": (Recurrent, 4), "data_dependent": (DataDependent, 1)}


@pytest.fixture(params=REFUSED)
def refused(request):
    features, width = REFUSED[request.param]
    return maml_with(Stack(nn.Flatten(), features()), width)


@pytest.mark.usefixtures("float64")
def test_vectorised_and_loop_agree_on_nested_arguments_and_on_their_gradients():
    weights = {"w": torch.randn(4, 3, 2, requires_grad=True), "b": torch.randn(4, 2, requires_grad=True)}
    x = torch.randn(4, 5, 3)
    results = [
        over_tasks(lambda p, x: (x @ p["w"] + p["b"]).tanh(), weights, x, engine=engine)
        for engine in ("vectorised", "loop")
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(result.square().sum(), list(weights.values())) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["vectorised", "loop"])
def test_every_task_draws_its_own_dropout(engine):
    dropped = over_tasks(nn.Dropout(0.5), torch.ones(2, 100), engine=engine)
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("wanted", ["auto", "vectorised"])
def test_what_vmap_takes_is_vectorised_without_a_word(wanted, caplog):
    meta_layer = maml_with(nn.Linear(1, 1))
    assert choose_engine(meta_layer, episode_of(meta_layer), wanted) == "vectorised"
    assert not caplog.records


def test_loop_is_taken_at_its_word(caplog):
    meta_layer = maml_with(nn.Linear(1, 1))
    assert choose_engine(meta_layer, episode_of(meta_layer), "loop") == "loop"
    assert not caplog.records


def test_auto_falls_back_to_the_loop_and_names_the_module_in_one_line(refused, caplog):
    assert choose_engine(refused, episode_of(refused), "auto") == "loop"
    (record,) = caplog.records
    assert record.name == "mlframework.backend.engine"
    assert record.levelno == logging.WARNING
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 240
    assert "vmap refuses features.1" in record.getMessage()
    assert any(f"({name})" in record.getMessage() for name in ("GRU", "DataDependent"))


def test_vectorised_on_a_module_that_vmap_refuses_says_what_to_do(refused, caplog):
    with pytest.raises(InvalidValue, match=r"^engine=vectorised: vmap refuses features\.1.*: use loop or auto$"):
        choose_engine(refused, episode_of(refused), "vectorised")
    assert not caplog.records


def test_an_unknown_engine_is_refused_with_the_choices_and_the_nearest():
    meta_layer = maml_with(nn.Linear(1, 1))
    with pytest.raises(InvalidValue, match=r"must be one of auto, vectorised, loop \(did you mean vectorised\?\)"):
        choose_engine(meta_layer, episode_of(meta_layer), "vectorized")


@pytest.mark.parametrize("wanted", ["auto", "vectorised"])
def test_a_mistake_in_the_module_surfaces_as_itself(wanted, caplog):
    meta_layer = maml_with(Broken())
    with pytest.raises(ZeroDivisionError, match="a mistake in the module") as raised:
        choose_engine(meta_layer, episode_of(meta_layer), wanted)
    assert raised.value.__context__ is None
    assert not caplog.records


def test_an_episode_of_one_task_tells_as_well(refused):
    assert choose_engine(refused, episode_of(refused, 1), "auto") == "loop"


def test_choosing_leaves_the_meta_layer_and_the_random_numbers_alone():
    meta_layer = maml_with(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)))
    meta_layer.engine = "loop"
    random_state, state = torch.get_rng_state(), {k: v.clone() for k, v in meta_layer.state_dict().items()}
    assert choose_engine(meta_layer, episode_of(meta_layer), "auto") == "vectorised"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in meta_layer.state_dict().items())
    assert all(p.grad is None for p in meta_layer.parameters())
    assert meta_layer.engine == "loop"
    assert meta_layer.training


@pytest.mark.usefixtures("float64")
def test_the_loop_differentiates_a_gru_twice():
    meta_layer = maml_with(Stack(nn.Flatten(), Recurrent()), 4)
    episode = in_float64(episode_of(meta_layer))
    meta_layer.engine = choose_engine(meta_layer, episode, "auto")
    assert meta_layer.engine == "loop"
    assert directional_errors(meta_layer, episode).max() < 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("engine", ["vectorised", "loop"])
def test_a_module_that_writes_to_its_buffers_starts_every_task_alike_and_stays_as_it_was(engine):
    meta_layer = maml_with(Counting())
    episode = in_float64(episode_of(meta_layer))
    meta_layer.engine = engine
    losses, _ = meta_gradient(meta_layer, episode)
    assert meta_layer.base_layer.features.calls == 0
    alone = torch.cat([meta_gradient(meta_layer, part)[0] for part in episode.chunks(1)])
    torch.testing.assert_close(losses, alone, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("float64")
def test_the_loop_costs_no_backward_of_all_tasks_for_each():
    """Taking task after task by an index would fill a gradient of all tasks for each of them."""
    stacked = torch.ones(50, 3, requires_grad=True)
    result = over_tasks(lambda p: p.sum(), stacked, engine="loop")
    (backward,) = {edge[0].next_functions[0][0].name() for edge in result.grad_fn.next_functions}
    assert backward == "UnbindBackward0"


@pytest.mark.usefixtures("float64")
def test_the_loop_of_an_mlp_has_the_gradient_of_the_vectorised_one():
    task = Sinusoid(k_shot=4, k_query=4)
    meta_layer = MAML(MLP(task.spec), task, update=partial(SGD, lr=0.01), meta_gradient=Exact(), inner_steps=2)
    episode = in_float64(episode_of(meta_layer, num_tasks=7))
    found = []
    for engine in ("vectorised", "loop"):
        meta_layer.engine = engine
        meta_gradient(meta_layer, episode)
        found.append([p.grad.clone() for p in meta_layer.parameters()])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
