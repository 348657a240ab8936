"""A support set larger than memory: adapted to in parts, with the results of the whole and the memory of a part."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import SHORT, call
from hydra import compose, initialize_config_module

from mlframework.backend.machine import PeakMemory
from mlframework.base_layers import Conv4
from mlframework.cli.train import main
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import InvalidValue
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, FirstOrder, LinearKernel, Prototypes, Ridge, StoppedLoss
from mlframework.runs import build
from mlframework.runs.trained import Trained
from mlframework.tasks import TaskDistribution
from mlframework.training.meta_gradient import meta_gradient

ALGORITHMS = sorted(path.stem for path in (Path(__file__).parent.parent / "conf/algorithm").glob("*.yaml"))
FAST = ("maml", "anil", "reptile", "proto_maml", "prototypes", "ridge", "in_context")


def algorithms():
    others = [name for name in ALGORITHMS if name not in (*FAST, "ridge_shared_head")]  # that one is for regressions
    return [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


class Images(TaskDistribution):
    """One support set of many small images, in unequal numbers that count."""

    def __init__(self, count=7, size=8, classes=3):
        self.spec = TaskSpec("classification", (1, size, size), classes)
        self.count = count

    def sample(self, num_tasks, split, generator):
        def examples(n):
            y = torch.arange(n) % self.spec.out_features
            x = torch.randn(num_tasks, n, *self.spec.x_shape, generator=generator)
            mask = torch.ones(num_tasks, n)
            mask[0, n - 2 :] = 0
            return Examples(x, y.repeat(num_tasks, 1), mask)

        return Episode(examples(self.count), examples(5))


def of_preset(algorithm, task):
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        overrides = [
            "task=digits",
            "base_layer=mlp",
            "base_layer.hidden=[8]",
            "suggested.test_inner_steps=2",
            "suggested.inner_steps=2",
        ]
        config = compose("train", [f"algorithm={algorithm}", *overrides])
    torch.manual_seed(0)
    return build.build_meta_layer(config, task).double()


def drawn(task, tasks=1):
    return task.sample(tasks, "train", torch.Generator().manual_seed(0))


def in_double(episode):
    return Episode(*(part._replace(x=part.x.double()) for part in episode))


def results(layer, episode):
    """The meta-losses, the meta-gradient, and predictions after adapting in evaluation mode."""
    losses, _ = meta_gradient(layer.train(), episode)
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    with torch.no_grad():
        predictions = layer.eval().predict(layer.adapt(episode.support), episode.query.x)
    return {"losses": losses, "predictions": predictions, **grads}


@pytest.mark.parametrize("algorithm", algorithms())
def test_an_algorithm_in_parts_has_the_losses_the_meta_gradient_and_the_predictions_of_the_whole(algorithm):
    task = Images()
    layer = of_preset(algorithm, task)
    episode = in_double(drawn(task, 2))
    whole = results(layer, episode)
    for chunk in (3, 1, 100):  # parts of unequal size, single examples, one part
        layer.take_support_by(chunk)
        torch.testing.assert_close(results(layer, episode), whole, rtol=1e-9, atol=1e-12)


def conv4(task):
    return Conv4(task.spec, filters=8, norm="group")


def maml(task, meta_gradient):
    return MAML(conv4(task), task, update=partial(SGD, lr=0.1), meta_gradient=meta_gradient, inner_steps=2)


def adapt(layer, episode):
    with torch.no_grad():
        layer.adapt(episode.support)


def adapted_in_parts(layer, support):
    layer.take_support_by(5)
    layer.adapt(support)


def meta_step(layer, episode):
    meta_gradient(layer, episode)


@pytest.mark.parametrize(
    ("make", "work"),
    [
        (partial(maml, meta_gradient=Exact()), adapt),
        pytest.param(partial(maml, meta_gradient=Exact()), meta_step, marks=pytest.mark.slow),
        pytest.param(partial(maml, meta_gradient=FirstOrder()), meta_step, marks=pytest.mark.slow),
        (lambda task: Prototypes(conv4(task), task), adapt),
        (lambda task: Ridge(conv4(task), task, kernel=LinearKernel(constant=1.0)), adapt),
        pytest.param(lambda task: Prototypes(conv4(task), task), meta_step, marks=pytest.mark.slow),
    ],
    ids=["maml adapts", "maml", "fomaml", "prototypes adapts", "ridge adapts", "prototypes"],
)
def test_many_examples_in_parts_take_a_tenth_of_the_memory_of_the_whole(make, work):
    task = Images(count=400, size=16)
    layer, episode = make(task), drawn(task)
    peaks = []
    for chunk in (None, 10):
        layer.take_support_by(chunk)
        work(layer, episode)  # so that the memory of `.grad` is there before
        with PeakMemory() as memory:
            work(layer, episode)
        peaks.append(memory.peak)
    assert peaks[1] < peaks[0] / 10


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda task: Prototypes(Conv4(task.spec, filters=4), task), "features.0.1 mixes examples, .*norm=group"),
        (
            lambda task: MAML(
                conv4(task), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1,
                inner_loss=partial(StoppedLoss, limit=0.1),
            ),
            "StoppedLoss is no mean over examples",
        ),
    ],
)  # fmt: skip
def test_what_needs_all_examples_at_once_is_refused_in_one_line(make, line):
    task = Images(size=16)
    with pytest.raises(InvalidValue, match=re.compile(f"support_chunk=5: {line}")):
        adapted_in_parts(make(task), drawn(task).support)


def test_a_trained_algorithm_adapts_in_parts_when_asked():
    layer = maml(Images(size=16), Exact())
    x, y = torch.randn(9, 1, 16, 16), torch.arange(9) % 3
    whole = Trained(layer).adapt(x, y).predict(x)
    in_parts = Trained(layer).adapt(x, y, support_chunk=2)
    torch.testing.assert_close(in_parts.predict(x), whole)
    assert in_parts.meta_layer.support_chunk == 2 and layer.support_chunk is None


@pytest.mark.parametrize("capture", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_run_in_parts_learns_what_the_whole_does(tmp_path, capture):
    small = ["algorithm=maml", "algorithm.inner_steps=2", "base_layer.hidden=[8]", "task.k_shot=5"]
    said = [*small, f"outer.capture={capture}", *SHORT, "evaluation=none"]
    found = []
    for name, more in {"whole": [], "parts": ["outer.support_chunk=2"]}.items():
        done = call(main, *said, f"run_dir={name}", *more, folder=tmp_path)
        assert done.exit_code == 0
        found.append(re.search(r"query_loss (\S+)", done.err + done.out)[1])
    assert found[0] == found[1]


def test_a_number_that_cannot_be_is_said_in_one_line(tmp_path):
    said = call(main, "outer.support_chunk=0", "run_dir=mine", *SHORT, folder=tmp_path)
    assert said.exit_code == 2 and said.err.startswith("outer.support_chunk=0: must be at least 1")
