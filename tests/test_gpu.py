"""On a GPU all is what it is on the CPU; where there is none, these tests are skipped."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

import mlframework.backend.capture
from mlframework import load
from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.capture import Capture
from mlframework.backend.cuda_graphs import RecordedStep
from mlframework.backend.machine import medians
from mlframework.base_layers import MLP
from mlframework.episode import Episode
from mlframework.errors import IncompatibleKind
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.runs import build
from mlframework.runs.run import train_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Sinusoid
from mlframework.testing import check_meta_layer, in_float64
from mlframework.training.meta_gradient import meta_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ALGORITHMS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "algorithm").glob("*.yaml"))
#: Small tasks, in the order in which an algorithm is tried on them.
TASKS = ("task=sinusoid", "task=digits base_layer=conv4 base_layer.filters=8 task.n_way=2", "task=text_lists")
#: Algorithms of each family that are captured here: one graph, units, a solver between units.
CAPTURED = ("maml", "cavia", "prototypes", "ridge", "svm", "imaml")


@cache
def built(algorithm):
    """A config that the algorithm takes, and its task."""
    for overrides in TASKS:
        with initialize_config_module("mlframework.conf", version_base="1.3"):
            config = compose("train", [f"algorithm={algorithm}", *overrides.split()])
        task = build.build_task(config)
        try:
            build.build_meta_layer(config, task)
        except IncompatibleKind:
            continue
        return config, task
    raise AssertionError(f"{algorithm} takes none of the tasks")


def both(algorithm):
    """The same meta layer, and the same episode, on the CPU and on the GPU, in float64."""
    config, task = built(algorithm)
    episode = in_float64(task.sample(3, "train", torch.Generator().manual_seed(0)))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = build.build_meta_layer(config, task).double().to(device)
        outer = build.build_outer_loop(config, layer)
        outer.prepare(episode.to(device))
        layer.train()
        yield layer, episode.to(device)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_meta_gradient_is_that_of_the_cpu(algorithm, float64):
    losses, gradients = [], []
    for layer, episode in both(algorithm):
        losses.append(meta_gradient(layer, episode)[0].cpu())
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in layer.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-9)
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("algorithm", ["maml", "prototypes", "ridge", "in_context"])
def test_the_public_check_holds_there(algorithm):
    config, task = built(algorithm)
    check_meta_layer(lambda task: build.build_meta_layer(config, task), task, device="cuda", padding=False)


@pytest.mark.parametrize("algorithm", CAPTURED)
def test_a_captured_step_gives_what_an_eager_one_gives(algorithm, float64, caplog):
    caplog.set_level(logging.INFO, "mlframework.backend.capture")
    *_, (layer, episode) = both(algorithm)
    capture = Capture(layer, "true")
    found, expected = capture(episode), eager_gradients(layer, episode)
    assert "compiled in" in caplog.text, caplog.text
    for name, grad in expected.by_name.items():
        assert found.by_name[name].device.type == "cuda"
        assert (found.by_name[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-9, name


@pytest.mark.parametrize(("algorithm", "expected"), [("maml", True), ("imaml", True), ("svm", False)])
def test_a_step_is_recorded_where_it_does_not_wait_for_the_gpu(algorithm, expected, float64):
    *_, (layer, episode) = both(algorithm)
    capture = Capture(layer, "true")
    first = capture(episode)
    before = {name: grad.clone() for name, grad in first.by_name.items()}
    assert isinstance(*capture.steps.values(), RecordedStep) == expected
    other = Episode(*(part._replace(x=part.x.flip(1)) for part in episode))
    for move in (in_place, elsewhere):  # as an optimizer does, and as somebody who sets new parameters
        move(layer)
        found, expected_now = capture(other), eager_gradients(layer, other)
        for name, grad in expected_now.by_name.items():
            assert (found.by_name[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-9, name
    for name, grad in first.by_name.items():
        assert torch.equal(grad, before[name]), name


def in_place(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.01)


def elsewhere(layer):
    for p in layer.parameters():
        p.data = p.detach() * 0.99


class Weighted(MAML):
    """Its loss grows with the outer step, outside of what is compiled where a step is compiled in units."""

    def meta_loss(self, episode):
        losses, metrics = super().meta_loss(episode)
        return losses * (torch.ones((), device=losses.device) * self.outer_step), metrics


def test_what_changes_with_the_outer_step_is_not_recorded(monkeypatch):
    monkeypatch.setattr(mlframework.backend.capture, "MOST_OPERATIONS", 0)  # in units
    update = partial(SGD, lr=0.01)
    layer = Weighted(MLP(Sinusoid().spec, hidden=[8]), Sinusoid(), update=update, meta_gradient=Exact(), inner_steps=2)
    layer, episode = layer.to("cuda"), Sinusoid().sample(3, "train", torch.Generator().manual_seed(0)).to("cuda")
    capture = Capture(layer.train(), "true")
    for step in (1, 2, 3):
        layer.outer_step = step
        found, expected = capture(episode), eager_gradients(layer, episode)
        torch.testing.assert_close(found.losses, expected.losses)
    assert not isinstance(*capture.steps.values(), RecordedStep)


def train(folder, *more):
    overrides = [
        *("algorithm=maml", "base_layer.hidden=[8]", "trainer.meta_batch=4", "trainer.checkpoint_every=10"),
        *("trainer.validate_every=10", "trainer.validation_tasks=4", "evaluation=none", "logger.figures=false"),
        *more,
    ]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*overrides, f"run_dir={folder}"])
    train_run(config, RunFolder(folder), overrides=overrides)
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_device_has_its_number(name):
    device = build.build_device(name)
    assert device == torch.ones(1, device=name if name != "auto" else "cuda").device == torch.device("cuda", 0)
    assert torch.cuda.current_device() == device.index


@pytest.mark.parametrize("capture", ["false", "true"])
def test_a_run_goes_on_where_it_was_and_its_weights_are_read_on_the_cpu(tmp_path, caplog, capture):
    options = (f"outer.capture={capture}", "outer.chunk=null", "device=auto", "schedule=constant")
    whole = train(tmp_path / "whole", "trainer.steps=20", *options)
    train(tmp_path / "halves", "trainer.steps=10", *options)
    halves = train(tmp_path / "halves", "trainer.steps=20", "resume=true", *options)
    assert "eager steps instead" not in caplog.text
    assert halves["progress"]["step"] == whole["progress"]["step"] == 20
    for name, value in whole["meta_layer"].items():
        torch.testing.assert_close(halves["meta_layer"][name], value, rtol=1e-4, atol=1e-5)
    trained = load(tmp_path / "whole", device="cpu")
    assert trained.device.type == "cpu"
    assert load(tmp_path / "whole").device.type == "cuda"


def test_what_a_gpu_has_not_done_yet_counts():
    x = torch.randn(4096, 4096, device="cuda")

    def products():
        for _ in range(20):
            x @ x

    products()
    torch.cuda.synchronize()
    seconds = medians({"products": products})["products"]
    assert seconds > 20 * 2 * 4096**3 / 1e15  # a GPU of a thousand TFLOP/s is yet to be made for float32
