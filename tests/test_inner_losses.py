"""An inner loss of its own: learned, different from task to task, or with a term beside the support loss."""

from functools import partial
from inspect import signature

import pytest
import torch
from torch import nn

from mlframework.base_layers import MLP
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD, Proximal
from mlframework.meta_layers import CAVIA, MAML, Exact, FirstOrder, Implicit, LearnedLoss, LoRA, Shift, SupportLoss
from mlframework.tasks import Digits, Sinusoid
from mlframework.testing import directional_errors, in_float64
from mlframework.training.meta_gradient import MissingGradient, meta_gradient

pytestmark = pytest.mark.usefixtures("float64")

RULE = partial(SGD, lr=0.1)


def layer_of(inner_loss, *, update=RULE, meta_gradient=None, steps=2, task=None):
    torch.manual_seed(0)
    task = task or Sinusoid(k_shot=4, k_query=5)
    base = MLP(task.spec, hidden=[6, 6])
    settings = {"meta_gradient": meta_gradient or Exact(), "inner_steps": steps}
    return MAML(base, task, update=update, inner_loss=inner_loss, **settings)


def episode_of(layer, tasks=3):
    return in_float64(layer.task.sample(tasks, "train", torch.Generator().manual_seed(1)))


def stirred_loss(loss):
    """Away from the start, at which a learned loss is the support loss."""
    for p in loss.parameters():
        nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(p.numel()))
    return loss


def stirred(layer):
    stirred_loss(layer.inner_loss)
    return layer


@pytest.mark.parametrize("support_weight", [0.0, 0.5])
def test_the_meta_gradient_of_a_learned_loss_equals_finite_differences(support_weight):
    layer = stirred(layer_of(partial(LearnedLoss, hidden=[5], support_weight=support_weight)))
    assert max(directional_errors(layer, episode_of(layer))) < 1e-6


def test_a_learned_loss_starts_as_the_support_loss():
    learned, plain = layer_of(LearnedLoss), layer_of(SupportLoss)
    episode = episode_of(plain)
    torch.testing.assert_close(learned.adapt(episode.support), plain.adapt(episode.support))
    meta_gradient(learned, episode)
    assert learned.inner_loss.network[-1].weight.grad.abs().max() > 0


ADDED = [
    (CAVIA, {"modulates": "features.1", "modulation": Shift, "context_size": 3}),
    (LoRA, {"layers": ".", "rank": 2}),
]


@pytest.mark.parametrize(("algorithm", "settings"), ADDED)
def test_cavia_and_lora_take_the_settings_of_maml_but_for_what_adapts(algorithm, settings):
    assert set(signature(MAML).parameters) - set(signature(algorithm).parameters) == {"adapts"}
    torch.manual_seed(0)
    task = Sinusoid(k_shot=4, k_query=5)
    settings |= {"update": RULE, "meta_gradient": Exact(), "inner_loss": LearnedLoss, "inner_steps": 2}
    layer = stirred(algorithm(MLP(task.spec, hidden=[6, 6]), task, **settings))
    assert max(directional_errors(layer, episode_of(layer))) < 1e-6


def test_an_implicit_meta_gradient_reaches_a_learned_loss():
    update = partial(Proximal, rule=partial(SGD, lr=0.02), strength=20.0)
    layer = stirred(layer_of(partial(LearnedLoss, hidden=[5]), update=update, meta_gradient=Implicit(30), steps=400))
    assert max(directional_errors(layer, episode_of(layer))) < 1e-4


def test_first_order_says_that_it_cannot_learn_a_loss():
    layer = layer_of(LearnedLoss, meta_gradient=FirstOrder())
    with pytest.raises(MissingGradient, match=r"inner_loss \(LearnedLoss\) takes no part"):
        meta_gradient(layer, episode_of(layer))


def test_padding_is_no_part_of_a_learned_loss():
    layer = stirred(layer_of(LearnedLoss))
    episode = episode_of(layer)
    layer.task.spec = layer.task.spec._replace(ragged=True)
    mask = episode.support.mask.clone()
    mask[:, -1] = 0
    support = episode.support._replace(mask=mask)
    other = support._replace(y=support.y + 10 * (1 - mask).unsqueeze(-1))
    torch.testing.assert_close(layer.adapt(support), layer.adapt(other))


@pytest.mark.parametrize(
    ("settings", "field"), [({"hidden": []}, "hidden"), ({"support_weight": -1.0}, "support_weight")]
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, field):
    with pytest.raises(InvalidValue) as raised:
        LearnedLoss(Sinusoid(), **settings)
    assert raised.value.field == field


def test_classes_are_read_as_one_hot_targets():
    task = Digits(n_way=2, k_shot=2, k_query=2)
    loss = stirred_loss(LearnedLoss(task, hidden=[4], support_weight=0.0))
    support = in_float64(task.sample(2, "train", torch.Generator().manual_seed(0))).support
    prediction = torch.randn(2, 4, 2)
    as_numbers = Sinusoid()
    as_numbers.spec = TaskSpec("regression", (1,), 2)
    same = LearnedLoss(as_numbers, hidden=[4], support_weight=0.0)
    same.load_state_dict(loss.state_dict())
    one_hot = support._replace(y=nn.functional.one_hot(support.y, 2).double())
    torch.testing.assert_close(loss(prediction, support, {}, 0), same(prediction, one_hot, {}, 0))


class Weighted(SupportLoss):
    """Each task's loss in its own unit: the spread of its targets."""

    def forward(self, prediction, support, params, step):
        return super().forward(prediction, support, params, step) / support.y.flatten(1).var(1)


class Decayed(SupportLoss):
    """A penalty of the parameters, which grows with the step."""

    def forward(self, prediction, support, params, step):
        square = sum(p.flatten(1).square().sum(1) for p in params.values())
        return super().forward(prediction, support, params, step) + 0.01 * (step + 1) * square


@pytest.mark.parametrize("loss", [Weighted, Decayed])
def test_a_loss_of_each_task_and_a_term_beside_the_support_loss(loss):
    layer = layer_of(loss)
    episode = episode_of(layer)
    assert max(directional_errors(layer, episode)) < 1e-6
    params = {name: p.detach() for name, p in layer.base_layer.named_parameters()}

    def by_hand(task, p, step):
        x, y = episode.support.x[task], episode.support.y[task]
        error = (torch.func.functional_call(layer.base_layer, p, (x,)) - y).square().mean()
        if loss is Weighted:
            return error / y.var()
        return error + 0.01 * (step + 1) * sum(q.square().sum() for q in p.values())

    adapted = layer.adapt(episode.support)
    for task in range(3):
        p = dict(params)
        for step in range(2):
            grads = torch.func.grad(lambda p, task=task, step=step: by_hand(task, p, step))(p)
            p = {name: value - 0.1 * grads[name] for name, value in p.items()}
        torch.testing.assert_close({name: value[task].detach() for name, value in adapted.items()}, p)
