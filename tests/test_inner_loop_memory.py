"""What an inner loop keeps: the memory of many inner steps beside that of few, and beside a plain loop's."""

from functools import partial

import pytest
import torch

from mlframework.backend.machine import PeakMemory
from mlframework.base_layers import MLP
from mlframework.evaluation.baselines.from_scratch import TrainedFromScratch
from mlframework.inner_loop import SGD, Proximal
from mlframework.meta_layers import MAML, Exact, FirstOrder, ParameterDifference
from mlframework.meta_layers.gradient_descent.imaml import Implicit
from mlframework.runs.trained import Trained
from mlframework.tasks import Sinusoid

FEW, MANY = 20, 200
TASK = Sinusoid(k_shot=5, k_query=5)


def network():
    return MLP(TASK.spec, hidden=[32, 32])


def maml(steps, meta_gradient):
    return MAML(network(), TASK, update=partial(SGD, lr=1e-3), meta_gradient=meta_gradient, inner_steps=steps)


def imaml(steps):
    update = partial(Proximal, rule=partial(SGD, lr=1e-3), strength=2.0)
    return MAML(network(), TASK, update=update, meta_gradient=Implicit(tolerance=10.0), inner_steps=steps)


def meta_step(layer, episode):
    layer.meta_loss(episode)[0].sum().backward()


def adapt(layer, episode):
    with torch.no_grad():
        layer.adapt(episode.support)


def scratch(steps):
    return TrainedFromScratch(network, TASK, update=partial(SGD, lr=1e-3), steps=steps)


#: How a meta layer of so many inner steps is made, and what is done with it.
WAYS = {
    "adapt": (lambda steps: maml(steps, Exact()), adapt),
    "adapt, of a loaded run": (
        lambda steps: maml(steps, Exact()),
        lambda layer, episode: Trained(layer).adapt(episode.tasks(slice(1)).support),
    ),
    "first order": (lambda steps: maml(steps, FirstOrder()), meta_step),
    "reptile": (lambda steps: maml(steps, ParameterDifference()), meta_step),
    "imaml": (imaml, meta_step),
    "from scratch": (scratch, adapt),
}


def peak(run):
    """The most bytes that are held while something runs; a first time leaves what is made once."""
    run()
    with PeakMemory() as memory:
        run()
    return memory.peak


def plain_loop(steps, episode):
    """Gradient steps of every task by hand."""
    layer = maml(steps, FirstOrder())
    start = {name: p.detach() for name, p in layer.initial(episode.support).items()}

    def run():
        params = start
        for _ in range(steps):
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
            loss = TASK.loss(layer.predict(params, episode.support.x), episode.support.y).mean(1).sum()
            grads = torch.autograd.grad(loss, list(params.values()))
            params = {name: p.detach() - 1e-3 * g for (name, p), g in zip(params.items(), grads, strict=True)}

    return run


@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_inner_steps_that_nothing_is_differentiated_through(way):
    make, use = WAYS[way]
    episode = TASK.sample(4, "train", torch.Generator().manual_seed(0))
    few, many = (peak(partial(use, make(steps), episode)) for steps in (FEW, MANY))
    assert many <= 1.1 * few


def test_adapting_takes_hardly_more_memory_than_a_plain_loop():
    episode = TASK.sample(4, "train", torch.Generator().manual_seed(0))
    by_hand = peak(plain_loop(MANY, episode))
    assert peak(partial(adapt, maml(MANY, Exact()), episode)) <= 2 * by_hand
