"""Exported models predict as the model that they were made of, for any number of queries."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from test_contracts import built, presets, slow_but, small
from torch import nn

from mlframework.base_layers import MLP, BaseLayer, BatchStatistics, Conv4
from mlframework.base_layers.base_layer import MixesExamples, Stack
from mlframework.episode import TaskSpec
from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.meta_layers import LinearKernel, Prototypes, Ridge
from mlframework.runs import build, export, save
from mlframework.runs.portable import log_ndtr
from mlframework.runs.trained import Trained
from mlframework.tasks import Digits, LinearTables, TablePrior, TaskDistribution

DOCS = Path(__file__).parents[1] / "docs"
#: In every test run; the others in .ci/run.
FAST = ("prototypes",)
#: A task of each kind that needs no data; an algorithm meets the first one that it takes.
TASKS = ("digits", "sinusoid", "text_lists")


def a_model(*overrides: str):
    """A task's model of a freshly built algorithm, and queries."""
    config = small(*overrides)
    task = built(OmegaConf.to_yaml(config.task, resolve=True))
    episode = task.sample(1, "test", torch.Generator().manual_seed(0))
    return Trained(build.build_meta_layer(config, task)).adapt(episode.support), episode.query.x[0]


def task_for(algorithm: str) -> str:
    kinds = get_class(small(f"algorithm={algorithm}").algorithm._target_).kinds
    return next(task for task in TASKS if built_kind(task) in kinds)


def built_kind(task: str) -> str:
    return {"digits": "classification", "sinusoid": "regression", "text_lists": "sequence"}[task]


def predicted(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What a file predicts, without this package."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["prediction"], {"x": x.numpy()})[0])


def check_file(path: Path, model, x: torch.Tensor) -> None:
    """Other queries than those of the export, and other numbers of them."""
    for rows in (x[:1], x, torch.cat([x] * 5)):
        wanted = model.predict(rows, batch_norm="support")
        torch.testing.assert_close(predicted(path, rows), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", slow_but(FAST, presets("algorithm")))
def test_every_algorithm_is_exported_in_both_formats(algorithm, tmp_path):
    pytest.importorskip("onnxscript")
    model, x = a_model(f"algorithm={algorithm}", f"task={task_for(algorithm)}")
    for name in ("model.pt2", "model.onnx"):
        check_file(model.export(tmp_path / name, batch_norm="support"), model, x)


#: Algorithms on sequences, with the network that goes on where it stopped, and one without.
@pytest.mark.slow
@pytest.mark.parametrize("typed", ["algorithm=in_context", "algorithm=in_context base_layer=gru", "algorithm=matching"])
def test_sequences_are_exported(typed, tmp_path):
    pytest.importorskip("onnxscript")
    model, x = a_model("task=text_lists", "task.k_shot=2", *typed.split())
    for name in ("model.pt2", "model.onnx"):
        check_file(model.export(tmp_path / name), model, x)


def test_the_page_names_what_cannot_be_exported():
    """Every preset is in the table of the page, with the formats that the tests above try."""
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`", page.split("<!-- presets -->")[1].split("\n\n")[0])) == set(presets("algorithm"))


# Batch norm.


def digits(base_layer: nn.Module | None = None, **settings):
    task = Digits(n_way=2, k_shot=3, k_query=4, validation_digits=[6, 7], test_digits=[8, 9])
    episode = task.sample(1, "test", torch.Generator().manual_seed(0))
    layer = Prototypes(Conv4(task.spec, filters=4) if base_layer is None else base_layer, task, **settings)
    return Trained(layer).adapt(episode.support), episode.query.x[0]


def test_the_support_sets_statistics_become_constants(tmp_path):
    model, x = digits()
    path = model.export(tmp_path / "model.pt2")
    check_file(path, model, x)
    constants = torch.export.load(path).constants
    assert not any(tuple(each.shape) == tuple(model.support.x.shape) for each in constants.values())
    norms = [module for module in model.meta_layer.modules() if isinstance(module, BatchStatistics)]
    assert norms and all(norm.fixed is None for norm in norms), "the model itself stays as it was"


class Centred(MixesExamples):
    """A norm of a user's own."""

    def forward(self, x, mask=None):
        weight = torch.ones(len(x)) if mask is None else mask
        return x - (x * weight[:, None]).sum(0) / weight.sum()


def test_with_a_users_own_norm_the_support_set_is_read_again(tmp_path):
    model, x = digits(BaseLayer(Stack(nn.Flatten(), Centred(), nn.Linear(64, 8)), nn.Linear(8, 2)))
    check_file(model.export(tmp_path / "model.pt2"), model, x)


def test_a_norm_that_is_called_twice_has_no_statistics_to_fix(tmp_path):
    norm = BatchStatistics(64)
    model, x = digits(BaseLayer(Stack(nn.Flatten(), norm, nn.ReLU(), norm, nn.Linear(64, 8)), nn.Linear(8, 2)))
    check_file(model.export(tmp_path / "model.pt2"), model, x)


# What cannot be.


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_other_policies_are_refused(policy, tmp_path):
    model, _ = digits(batch_norm=policy)
    with pytest.raises(InvalidValue, match=f"batch_norm={policy}: an exported model predicts each query by itself"):
        model.export(tmp_path / "model.pt2")


def test_another_ending_is_refused(tmp_path):
    model, _ = digits()
    with pytest.raises(InvalidValue, match=r"path=.*model.pth: must end in .onnx, or in .pt2"):
        model.export(tmp_path / "model.pth")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    model, _ = digits()
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    line = r"model.onnx: needs onnx, onnxscript, onnxruntime: pip install 'mlframework\[onnx\]'"
    with pytest.raises(UserError, match=line):
        model.export(tmp_path / "model.onnx")


class Sorted(nn.Module):
    """Branches on a value, which a program cannot."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_a_network_that_branches_on_values_is_refused_in_one_line(tmp_path):
    model, _ = digits(BaseLayer(Stack(nn.Flatten(), Sorted(), nn.Linear(64, 8)), nn.Linear(8, 2)))
    with pytest.raises(UserError, match=r"model.pt2: Prototypes cannot be written in this format: ") as refused:
        model.export(tmp_path / "model.pt2")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_file_that_predicts_otherwise_is_not_written(tmp_path, monkeypatch):
    """A network that counts its calls is another one each time."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    model, _ = digits(BaseLayer(Stack(nn.Flatten(), Counting(), nn.Linear(64, 8)), nn.Linear(8, 2)))
    with pytest.raises(FailedRun, match=r"model.pt2: not written: its predictions differ from the model's by"):
        model.export(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_log_ndtr_is_torchs():
    x = torch.linspace(-40, 10, 5001, dtype=torch.float64)
    torch.testing.assert_close(log_ndtr(x), torch.special.log_ndtr(x), rtol=0, atol=2e-7)


def test_fewer_classes_than_in_training_are_exported(tmp_path):
    task = Digits(n_way=3, k_shot=2, k_query=2, validation_digits=[4, 5, 6], test_digits=[7, 8, 9])
    x = 0.4 * torch.rand(4, 1, 8, 8)  # mostly paper
    maml = small("algorithm=maml", "task=digits", "base_layer=mlp")
    model = Trained(build.build_meta_layer(maml, task)).adapt(x, [0, 0, 1, 1], n_way=2)
    path = model.export(tmp_path / "model.pt2")
    assert predicted(path, x).shape == (4, 2)
    check_file(path, model, x)


@pytest.mark.parametrize("prepared", [True, False])
def test_an_exported_regression_has_the_units_of_the_data(tmp_path, prepared):
    """A table whose target is scaled as the training's was, and one that is scaled by the support rows."""
    rows = np.random.default_rng(0).uniform(size=(12, 2))
    values = 1000 + 50 * rows.sum(1)
    task = TablePrior(kind="regression", generator={"linear": LinearTables()}) if prepared else in_thousands()
    layer = Ridge(MLP(task.spec, hidden=[8]), task, kernel=LinearKernel(constant=1.0), reg=0.01)
    model = Trained(layer).adapt(rows, values)
    path = model.export(tmp_path / "model.pt2")
    found, wanted = predicted(path, model.queries(rows[:5])), model.predict(rows[:5])
    assert 900 < float(wanted.mean()) < 1200
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-2)


def in_thousands():
    """A regression whose values are thousands to its user."""
    return InUnits(lambda values: values * 1000, lambda y: y / 1000)


def test_small_units_are_compared_as_exactly_as_large_ones(tmp_path, monkeypatch):
    task = InUnits(lambda values: values * 1e-6, lambda y: y * 1e6)
    layer = Ridge(MLP(task.spec, hidden=[8]), task, kernel=LinearKernel(constant=1.0), reg=0.01)
    model = Trained(layer).adapt(torch.rand(12, 2), 1e-6 * torch.rand(12, 1))
    monkeypatch.setattr(export, "written", lambda layer, program, path: (b"", lambda x: torch.full((len(x), 1), 5e-7)))
    with pytest.raises(FailedRun, match="its predictions differ from the model's"):
        model.export(tmp_path / "model.pt2")


def test_units_that_are_no_scale_and_offset_are_refused(tmp_path):
    task = InUnits(torch.tanh, lambda y: y)
    layer = Ridge(MLP(task.spec, hidden=[8]), task, kernel=LinearKernel(constant=1.0), reg=0.01)
    model = Trained(layer).adapt(torch.rand(12, 2), torch.rand(12, 1))
    with pytest.raises(UserError, match=r"InUnits\.decode_values must be a scale and an offset"):
        model.export(tmp_path / "model.pt2")


def test_a_path_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    task = Digits(n_way=2, k_shot=2, k_query=2)
    model = Trained(Prototypes(MLP(task.spec, hidden=[8]), task)).adapt(torch.rand(4, 1, 8, 8), [0, 1, 0, 1])
    assert model.export("~/model.pt2") == tmp_path / "model.pt2"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


class InUnits(TaskDistribution):
    """A regression whose values its user sees and gives in units of their own."""

    spec = TaskSpec("regression", (2,), 1)

    def __init__(self, decode, encode):
        self.decode, self.encode = decode, encode

    def encode_targets(self, y, support=None):
        return self.encode(super().encode_targets(y))

    def decode_values(self, values, support=None):
        return self.decode(values)

    def sample(self, num_tasks, split, generator):
        raise NotImplementedError


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    task = Digits(n_way=2, k_shot=2, k_query=2)
    Path("runs").mkdir()
    save(Prototypes(MLP(task.spec, hidden=[8]), task), "runs/mine")
    rows = np.random.default_rng(0).uniform(0, 0.4, (7, 1, 8, 8)).astype(np.float32)
    names = {"x": rows[:4], "y": [0, 1, 0, 1], "queries": rows[4:]}
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(first, names)
    wanted = names["model"].predict(rows[4:]).numpy()
    for block in others:
        exec(block, names)
        np.testing.assert_allclose(np.asarray(names["prediction"]), wanted, atol=1e-5)
    assert len(others) == 2


def test_an_exported_regression_needs_only_numpy_inputs(tmp_path):
    task = small("task=sinusoid", "algorithm=ridge")
    made = built(OmegaConf.to_yaml(task.task, resolve=True))
    layer = build.build_meta_layer(task, made)
    x = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    path = Trained(layer).adapt(x, np.sin(x)).export(str(tmp_path / "wave.pt2"))
    assert torch.export.load(path).module()(torch.zeros(7, 1)).shape == (7, 1)
    assert isinstance(layer.base_layer.features, type(MLP(made.spec).features))
