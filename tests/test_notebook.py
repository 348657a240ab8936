"""Meta-training, evaluating, saving and loading objects at hand; docs/notebook.md runs as it stands."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from commands import SHORT, call
from hydra import compose, initialize_config_module
from tables import good_rows, write
from test_contracts import presets
from test_docs import DOCS, FENCE
from torch import nn

from mlframework.base_layers import MLP, BaseLayer
from mlframework.cli.train import main
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation import FromScratch
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, FeatureMetaLayer, Prototypes
from mlframework.runs import Trained, build, evaluate, load, save, train
from mlframework.runs.saved import PARTS
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TaskDistribution
from mlframework.training import checkpoint

TASK = Sinusoid(k_shot=5, k_query=5)


def maml(network=None, **settings):
    settings = {"update": functools.partial(SGD, lr=0.01), "meta_gradient": Exact(), "inner_steps": 1, **settings}
    return MAML(network or MLP(TASK.spec, hidden=[8]), TASK, **settings)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    ((_, _, text),) = FENCE.findall((DOCS / "notebook.md").read_text(encoding="utf-8"))
    assert len(text.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(text, made)
    assert np.mean(made["losses"][-100:]) < 0.7 * np.mean(made["losses"][:100])
    metrics = made["report"].rows[0].metrics["query_loss"]
    assert metrics[5].mean < metrics[1].mean < metrics[0].mean
    assert made["report"].task_hash in capsys.readouterr().out
    queries = np.linspace(-4, 4, 7)[:, None]
    assert torch.equal(made["model"].predict(queries), made["again"].predict(queries))


def test_the_example_of_the_readme_runs(capsys):
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (text,) = (text for language, name, text in FENCE.findall(readme) if language == "python")
    exec(text, {})
    assert float(capsys.readouterr().out.split()[0]) > 0.7


def test_train_takes_the_steps_of_the_command_line(tmp_path):
    typed = (*SHORT, "trainer.steps=5", "trainer.meta_batch=3", "seed=7", "evaluation=none", "run_dir=run")
    assert call(main, *typed, folder=tmp_path).exit_code == 0
    torch.manual_seed(7)
    layer = built("seed=7")
    losses = train(layer, steps=5, meta_batch=3, lr=3e-3, seed=7)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["meta_layer"]
    assert len(losses) == 5 and state
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_network_of_other_numbers_than_the_tasks_is_refused_in_one_line():
    line = r"parameters of torch\.float64: tasks draw torch\.float32: call torch\.set_default_dtype\(torch\.float64\)"
    for use in (functools.partial(train, steps=1), evaluate):
        with pytest.raises(InvalidValue, match=line):
            use(maml().double())


def test_evaluations_with_one_seed_are_of_the_same_tasks():
    layer = maml()
    one, same, other = (evaluate(layer, tasks=5, validation_tasks=3, seed=seed) for seed in (1, 1, 2))
    assert one.task_hash == same.task_hash != other.task_hash
    assert one.rows[0].values == same.rows[0].values


def built(*overrides):
    """The algorithm of a config."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", list(overrides))
    return build.build_meta_layer(config, build.build_task(config))


def assert_loaded_as_saved(layer, file):
    save(layer, file)
    again = load(file, device="cpu").meta_layer
    assert type(again) is type(layer) and type(again.task) is type(layer.task) and again.task.spec == layer.task.spec
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    for one, other in [(layer, again), (layer.task, again.task)]:
        numbers, others = (
            {
                k: v
                for k, v in vars(each).items()
                if isinstance(v, int | float | str) and k not in ("engine", "training")
            }
            for each in (one, other)
        )
        assert numbers == others


def test_baselines_are_judged_beside_the_algorithm():
    layer, few = maml(), {"tasks": 3, "validation_tasks": 3}
    baseline = {"from_scratch": FromScratch(tasks=3, steps=2)}
    report = evaluate(layer, baseline=baseline, make_base_layer=lambda: MLP(TASK.spec, hidden=[8]), **few)
    assert [row.method for row in report.rows] == ["MAML", "from scratch"]
    with pytest.raises(InvalidValue, match="make_base_layer=None: must draw a new network"):
        evaluate(layer, baseline=baseline, **few)


@pytest.mark.parametrize("algorithm", presets("algorithm"))
def test_a_saved_algorithm_is_loaded_with_all_its_settings(tmp_path, algorithm):
    task = {"in_context": "text_lists", "ridge_shared_head": "sinusoid"}.get(algorithm, "digits")
    assert_loaded_as_saved(built(f"algorithm={algorithm}", f"task={task}"), tmp_path / "layer.safetensors")


@pytest.mark.parametrize("task", presets("task"))
def test_an_algorithm_is_loaded_with_its_task(tmp_path, task):
    path = [f"task.path={tmp_path}"] if task.endswith("_folder") else []
    if task == "table":
        file = write(tmp_path / "schools.csv", good_rows())
        path = [f"task.path={file}", "task.task_column=school", "task.target=score", "task.ignore=[]"]
    assert_loaded_as_saved(built("algorithm=maml", f"task={task}", *path), tmp_path / "layer.safetensors")


def classes_of(x):
    splits = dict.fromkeys(("train", "validation", "test"), ClassIndexed.from_classes("abc", x))
    return ArrayTasks(splits, n_way=2, k_shot=2, k_query=3)


def test_arrays_do_not_go_into_the_file(tmp_path):
    task = classes_of(torch.randn(3, 20, 4))
    layer = Prototypes(MLP(task.spec, hidden=[8]), task)
    save(layer, tmp_path / "layer.safetensors")
    loaded = load(tmp_path / "layer.safetensors")
    x, y = np.random.default_rng(0).normal(size=(4, 4)), [0, 1, 0, 1]
    assert torch.equal(Trained(layer).adapt(x, y).predict(x), loaded.adapt(x, y).predict(x))
    with pytest.raises(UserError, match="holds no data"):
        evaluate(loaded.meta_layer, tasks=1)


class NearestMean(FeatureMetaLayer):
    """A class that is in no package."""

    kinds = ("classification",)

    def fit(self, features, support):
        members = self.targets(support)
        return members.mT @ features / members.sum(1).unsqueeze(-1)

    def outputs(self, adapted, features):
        return -(features.unsqueeze(2) - adapted.unsqueeze(1)).square().sum(-1)


def test_a_class_of_the_users_own_is_handed_over(tmp_path):
    task = classes_of(torch.randn(3, 20, 4))
    save(NearestMean(MLP(task.spec, hidden=[8]), task), tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=r"NearestMean is no class of mlframework .* load\(path, classes="):
        load(tmp_path / "own.safetensors")
    assert isinstance(load(tmp_path / "own.safetensors", classes=[NearestMean]).meta_layer, NearestMean)


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "mlframework.load", "mlframework.runs.run.git"])
def test_a_file_runs_no_code_of_its_own(tmp_path, target):
    layer = maml()
    save(layer, tmp_path / "layer.safetensors")
    parts = json.loads(checkpoint.read_metadata(tmp_path / "layer.safetensors")[PARTS])
    parts["algorithm"]["update"] = {"_target_": target, "command": "true"}
    checkpoint.save_weights(tmp_path / "evil.safetensors", layer, metadata={PARTS: json.dumps(parts)})
    with pytest.raises(UserError, match=f"evil.safetensors: {target} is no class of mlframework"):
        load(tmp_path / "evil.safetensors")


class Doubled(TaskDistribution):
    """A loss of its own, in no package."""

    spec = TASK.spec

    def sample(self, num_tasks, split, generator):
        return TASK.sample(num_tasks, split, generator)

    def loss(self, prediction, y):
        return 2 * super().loss(prediction, y)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: maml(BaseLayer(nn.Linear(1, 4), nn.Linear(4, 1))),
            "Linear cannot be saved: build it in a BaseLayer",
        ),
        (lambda: maml(nn.Linear(1, 1)), "Linear cannot be saved"),
        (lambda: maml(update=lambda params: SGD(params, lr=0.1)), "function cannot be saved"),
        (lambda: MAML(MLP(TASK.spec), Doubled(), **KEYWORDS), "Doubled is no class of mlframework"),
    ],
)
def test_what_a_file_cannot_describe_is_refused_when_it_is_saved(tmp_path, layer, message):
    with pytest.raises(UserError, match=message):
        save(layer(), tmp_path / "layer.safetensors")
    assert not list(tmp_path.iterdir())


KEYWORDS = {"update": functools.partial(SGD, lr=0.01), "meta_gradient": Exact(), "inner_steps": 1}


def test_a_damaged_file_and_bare_weights_are_one_line(tmp_path):
    (tmp_path / "damaged").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(tmp_path / "damaged")
    checkpoint.save_weights(tmp_path / "weights", maml())
    with pytest.raises(UserError, match="holds weights alone"):
        load(tmp_path / "weights")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 2.0]], [[1.0], [2.0]], r"x=an array of shape \(1, 2\): must be of shape \('n', 1\)"),
        ([[1.0], [2.0]], [[1.0, 2.0]], r"y=an array of shape \(1, 2\): must be of shape \('n', 1\)"),
        ([[1.0], [2.0]], [[1.0]], "y=1 targets: must be one for each of 2 inputs"),
    ],
)
def test_arrays_of_a_wrong_shape_are_refused(x, y, message):
    with pytest.raises(InvalidValue, match=message):
        Trained(maml()).adapt(x, y)
