"""A trained run as an estimator: labels, classes and shots of any kind, models in files, the rules of scikit-learn."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from commands import SHORT, call
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from test_contracts import maker, presets, slow_but, small

import mlframework
from mlframework.base_layers import MLP, LinearModel
from mlframework.cli.train import main
from mlframework.errors import IncompatibleTask, InvalidData, InvalidValue, UserError
from mlframework.meta_layers import DeepKernel, InContext, LinearKernel, Prototypes, RBFKernel, Ridge
from mlframework.runs import FewShotClassifier, FewShotRegressor, TableClassifier, TaskModel, Trained, build, load, save
from mlframework.tasks import ArrayTasks, ClassIndexed, LinearTables, Pose, SklearnTables, TablePrior

FAST = ("maml", "prototypes", "ridge")


def digits(n_way=2):
    """All ten digits in every split, so that a task may have many classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images[:, None]).float() / 16
    classes = ClassIndexed.from_labels(x, torch.from_numpy(data.target))
    return ArrayTasks(dict.fromkeys(("train", "validation", "test"), classes), n_way=n_way, k_shot=2, k_query=2)


def on_digits(algorithm, n_way=2):
    """A small algorithm that has not been trained, for digits; skipped where it takes no classes."""
    torch.manual_seed(0)
    try:
        return maker(small(f"algorithm={algorithm}", "task=digits", "base_layer=mlp"))(digits(n_way))
    except IncompatibleTask:
        pytest.skip("takes no classification")


def drawn(seed=0, classes=(0, 1), shots=(3, 2)):
    """Digits `[n, 1, 8, 8]` of some classes with so many shots each, and their numbers."""
    from sklearn.datasets import load_digits

    data, rng = load_digits(), np.random.default_rng(seed)
    rows = [rng.choice(np.flatnonzero(data.target == c), s, replace=False) for c, s in zip(classes, shots, strict=True)]
    chosen = rng.permutation(np.concatenate(rows))
    return (data.images[chosen, None] / 16).astype(np.float32), data.target[chosen]


# Classes and shots.


@pytest.mark.parametrize("algorithm", slow_but(FAST, presets("algorithm")))
def test_any_number_of_classes_or_one_line(algorithm):
    layer = on_digits(algorithm)
    x, y = drawn(classes=(0, 3, 5, 8, 9), shots=(1, 3, 2, 1, 2))
    estimator = FewShotClassifier(layer)
    if not layer.any_n_way:
        with pytest.raises(InvalidData, match=r"^y=5 classes: \w+ was trained with 2, and takes no more: .*n_way=5"):
            estimator.fit(x, y)
        return
    found = estimator.fit(x, y).predict_proba(x)
    assert found.shape == (9, 5) and estimator.classes_.tolist() == [0, 3, 5, 8, 9]
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    wide = on_digits(algorithm, n_way=5)
    # ProtoMAML's base layer has a head of another size, which is not used.
    weights = {name: value for name, value in layer.state_dict().items() if not name.startswith("base_layer.head.")}
    assert not wide.load_state_dict(weights, strict=False).unexpected_keys
    ids = np.unique(y, return_inverse=True)[1]
    np.testing.assert_allclose(found, Trained(wide).adapt(x, ids).predict(x).softmax(-1), atol=1e-5)


@pytest.mark.parametrize("algorithm", slow_but(FAST, presets("algorithm")))
def test_fewer_classes_than_in_training(algorithm):
    layer = on_digits(algorithm, n_way=3)
    x, y = drawn(shots=(1, 4))
    found = FewShotClassifier(layer).fit(x, y).predict_proba(x)
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("algorithm", slow_but(FAST, presets("algorithm")))
def test_an_adapted_model_in_one_file(algorithm, tmp_path):
    layer = on_digits(algorithm)
    x, y = drawn()
    estimator = FewShotClassifier(layer).fit(x, np.where(y == 0, "nought", "one"))
    estimator.save(tmp_path / "adapted.safetensors")
    again = FewShotClassifier.load(tmp_path / "adapted.safetensors", device="cpu")
    assert again.classes_.tolist() == ["nought", "one"]
    np.testing.assert_allclose(again.predict_proba(x), estimator.predict_proba(x), atol=1e-6)
    model = TaskModel.load(tmp_path / "adapted.safetensors", device="cpu")
    np.testing.assert_allclose(model.predict(x).softmax(-1), estimator.predict_proba(x), atol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [["b", "a"], [7, -3], [2.0, 1.0], [True, False], np.array(["zebra", "ape"], dtype=object)],
    ids=["texts", "integers", "floats", "truth values", "objects"],
)
def test_labels_are_the_users_own(labels):
    x, y = drawn()
    own = np.asarray(labels)[y]
    estimator = FewShotClassifier(on_digits("prototypes")).fit(x, own)
    assert estimator.classes_.tolist() == sorted(set(labels))
    assert set(estimator.predict(x).tolist()) <= set(labels)
    assert estimator.score(x, own) == (estimator.predict(x) == own).mean()
    ids = FewShotClassifier(on_digits("prototypes")).fit(x, (own == max(labels)).astype(int))
    np.testing.assert_allclose(ids.predict_proba(x), estimator.predict_proba(x), atol=1e-6)


def test_a_classifier_refuses_a_regression_and_the_other_way_round():
    with pytest.raises(InvalidValue, match="run=Prototypes: was trained on classification tasks: use FewShotClass"):
        FewShotRegressor(on_digits("prototypes")).fit(*drawn())


def test_a_deviation_that_nobody_states_is_refused():
    task = SklearnTables(kind="regression", columns=2, k_shot=5)
    estimator = FewShotRegressor(Ridge(LinearModel(task.spec), task, kernel=LinearKernel()))
    x, y = np.random.default_rng(0).normal(size=(10, 2)), np.arange(10.0)
    with pytest.raises(InvalidValue, match="return_std=True: Ridge states no deviation"):
        estimator.fit(x, y).predict(x, return_std=True)


# Scikit-learn.


def classifier():
    """Prototypes of standardised columns: a table prior takes any number of columns up to its width."""
    task = TablePrior(kind="classification", generator={"linear": LinearTables()}, columns=[1, 24], classes=[2, 10])
    torch.manual_seed(0)
    return FewShotClassifier(Prototypes(LinearModel(task.spec), task), device="cpu")


def regressor():
    task = TablePrior(kind="regression", generator={"linear": LinearTables()}, columns=[1, 24])
    torch.manual_seed(0)
    return FewShotRegressor(Ridge(LinearModel(task.spec), task, kernel=LinearKernel(constant=1.0)), device="cpu")


def in_context():
    task = TablePrior(kind="classification", generator={"linear": LinearTables()}, columns=[1, 24], classes=[2, 10])
    torch.manual_seed(0)
    layer = InContext(LinearModel(task.spec), task, width=8, depth=1, heads=2)
    return TableClassifier(layer, members=2, device="cpu")


UNTRAINED = "asks for accuracy, which a network has that was trained; this one was not"
HASHED = "joblib's hash of a module is not that of its copy; see test_fitting_leaves_the_run_as_it_is"
FLOAT32 = "asks for 1e-7, and networks compute in float32"
EXPECTED = {
    classifier: {"check_estimators_overwrite_params": HASHED},
    regressor: {"check_estimators_overwrite_params": HASHED, "check_methods_subset_invariance": FLOAT32},
    in_context: {"check_estimators_overwrite_params": HASHED, "check_classifiers_train": UNTRAINED},
}


def test_fitting_leaves_the_run_as_it_is():
    estimator = FewShotClassifier(on_digits("maml"))
    before = {name: value.clone() for name, value in estimator.run.state_dict().items()}
    estimator.fit(*drawn()).predict(drawn()[0])
    assert all(torch.equal(value, before[name]) for name, value in estimator.run.state_dict().items())
    assert estimator.get_params()["run"] is estimator.run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # checks that are skipped warn
@pytest.mark.parametrize("make", EXPECTED)
def test_the_checks_of_scikit_learn(make):
    results = check_estimator(make(), expected_failed_checks=EXPECTED[make], on_fail=None)
    failed = {r["check_name"]: str(r["exception"])[:300] for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(result["status"] == "passed" for result in results) > 30
    unneeded = {r["check_name"] for r in results if r["expected_to_fail"] and r["status"] == "passed"}
    assert not unneeded, "these pass: take them from the list"


def test_pipelines_folds_grids_and_clones():
    x, y = drawn(classes=(2, 3), shots=(12, 12))
    estimator = FewShotClassifier(on_digits("maml"))
    pipeline = make_pipeline(StandardScaler(), PCA(4), classifier())
    folds = cross_val_score(pipeline, x.reshape(len(x), -1), y, cv=3)
    assert len(folds) == 3 and folds.mean() > 0.8
    for given in (x, torch.from_numpy(x), list(x)):
        assert len(cross_val_score(estimator, given, y, cv=2)) == 2
    grid = GridSearchCV(estimator, {"inner_steps": [0, 3]}, cv=2).fit(x, y)
    assert set(grid.cv_results_["param_inner_steps"]) == {0, 3}
    direct = FewShotClassifier(estimator.run, inner_steps=3).fit(x, y)
    np.testing.assert_allclose(estimator.set_params(inner_steps=3).fit(x, y).predict_proba(x), direct.predict_proba(x))
    copy = clone(direct)
    assert copy.run is direct.run and not hasattr(copy, "model_")
    again = pickle.loads(pickle.dumps(direct))
    np.testing.assert_allclose(again.predict_proba(x), direct.predict_proba(x))


# Regressions, in the data's own units.


def test_a_table_that_nobody_has_seen_is_scaled_by_its_support_rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * [1.0, 50.0, 0.1] + [0.0, 1000.0, 7.0]
    y = 300 + x @ [2.0, 0.3, 40.0]
    found = regressor().fit(x[:30], y[:30])
    assert found.score(x[30:], y[30:]) > 0.9
    other = regressor().fit(3 * x[:30] + 1, 10 * y[:30]).predict(3 * x[30:] + 1)
    np.testing.assert_allclose(other, 10 * found.predict(x[30:]), rtol=1e-3)
    alone = np.concatenate([found.predict(row[None]) for row in x[30:]])
    np.testing.assert_allclose(alone, found.predict(x[30:]), rtol=1e-5)


def test_a_deviation_is_in_the_datas_own_units(tmp_path):
    task = TablePrior(kind="regression", generator={"linear": LinearTables()}, columns=[1, 4])
    torch.manual_seed(0)
    estimator = FewShotRegressor(DeepKernel(LinearModel(task.spec), task, kernel=RBFKernel()), device="cpu")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 2)), rng.normal(size=20)
    mean, deviation = estimator.fit(x, y).predict(x, return_std=True)
    assert mean.shape == deviation.shape == (20,) and (deviation > 0).all()
    estimator.save(tmp_path / "file")
    again = FewShotRegressor.load(tmp_path / "file", device="cpu").predict(x, return_std=True)
    np.testing.assert_allclose(again, (mean, deviation), rtol=1e-5)
    scaled = estimator.fit(x, 100 * y + 7).predict(x, return_std=True)
    np.testing.assert_allclose(scaled[0], 100 * mean + 7, atol=1e-2)
    np.testing.assert_allclose(scaled[1], 100 * deviation, rtol=1e-3)


def test_several_outputs_stay_several():
    task = Pose(k_shot=3, k_query=2, exclusive=True, objects=2, views=6)
    torch.manual_seed(0)
    estimator = FewShotRegressor(Ridge(MLP(task.spec, hidden=[4]), task, kernel=LinearKernel()))
    x = np.random.default_rng(0).uniform(size=(5, 28, 28))
    assert estimator.fit(x, np.zeros((5, 2))).predict(x).shape == (5, 2)


# Files.


def test_a_file_says_what_it_holds(tmp_path):
    layer = on_digits("prototypes")
    save(layer, tmp_path / "run")
    FewShotClassifier.load(tmp_path / "run", device="cpu").fit(*drawn()).save(tmp_path / "model")
    with pytest.raises(UserError, match=r"holds a model that is adapted to a task: TaskModel\.load\(\) reads it"):
        load(tmp_path / "model", device="cpu")
    with pytest.raises(UserError, match=r"holds a trained algorithm that is not adapted: load\(\) reads it"):
        TaskModel.load(tmp_path / "run", device="cpu")
    with pytest.raises(InvalidValue, match="was trained on classification tasks: use FewShotClassifier"):
        FewShotRegressor.load(tmp_path / "model", device="cpu")


def test_arrays_of_ones_own_need_no_run_folder(tmp_path):
    rng = np.random.default_rng(0)
    data = ClassIndexed.from_labels(torch.from_numpy(rng.normal(size=(60, 3))).float(), torch.arange(6).repeat(10))
    task = ArrayTasks({"train": data}, n_way=3, k_shot=1, k_query=4)
    x = rng.normal(size=(6, 3))
    y = ["north", "east", "south", "west", "north", "east"]
    estimator = FewShotClassifier(Prototypes(MLP(task.spec, hidden=[8]), task)).fit(x, y)
    estimator.save(tmp_path / "model")
    again = FewShotClassifier.load(tmp_path / "model", device="cpu")
    assert again.classes_.tolist() == ["east", "north", "south", "west"]
    np.testing.assert_allclose(again.predict_proba(x), estimator.predict_proba(x), atol=1e-6)


# Runs whose data are not there any more, and runs that are loaded from another folder.

WITH_DATA = {
    "table": ("task.path=data/schools.csv", "task.task_column=school", "task.target=score", "task.k_shot=3"),
    "ratings": ("task/source=table", "task.source.path=data/ratings.csv", "task.ratings=[2,null]", "task.k_query=2"),
    "image_folder": ("task.path=data/images", "task.image_size=8", "task.n_way=2", "task.k_query=1", "base_layer=mlp"),
    "text_folder": (
        "task.path=data/texts",
        "task.length=7",
        "task.k_query=2",
        "base_layer.width=8",
        "base_layer.depth=1",
    ),
}


def write_data(task, folder):
    """What a small training of the task reads."""
    from PIL import Image
    from tables import good_rows, write

    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    if task == "table":
        write(folder / "data" / "schools.csv", good_rows())
    if task == "ratings":
        rows = [f"u{u},i{i},{rng.integers(1, 6)}" for u in range(12) for i in rng.choice(9, 5, replace=False)]
        (folder / "data" / "ratings.csv").write_text("\n".join(["user,item,rating", *rows]))
    if task == "image_folder":
        for number in range(12):
            for image in range(3):
                place = folder / "data" / "images" / f"class{number}" / f"{image}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(place)
    if task == "text_folder":
        (folder / "data" / "texts").mkdir()
        for name in "abcde":
            lines = "\n".join(f"{name} says {number} things" for number in range(20))
            (folder / "data" / "texts" / f"{name}.txt").write_text(lines)


def used(task, trained):
    """What a run predicts for examples that were never in a file."""
    spec = trained.meta_layer.task.spec
    rng = np.random.default_rng(1)
    if task == "text_folder":
        return trained.adapt(["f says 3 things", "f says 4 things"]).predict(rng.integers(0, 256, (2, spec.x_shape[0])))
    if task == "image_folder":
        x = rng.integers(0, 256, (4, 10, 10, 3), dtype=np.uint8)
        return trained.adapt(x, [0, 1, 0, 1]).predict(x)
    x = rng.normal(size=(6, *spec.x_shape))
    return trained.adapt(x, np.arange(6.0)).predict(x)


@pytest.mark.slow
@pytest.mark.parametrize("task", WITH_DATA)
def test_a_run_is_used_where_its_data_are_not(task, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    write_data(task, home)
    typed = (f"task={task}", *WITH_DATA[task], *SHORT, "evaluation=none", "run_dir=run")
    said = call(main, *typed, folder=home)
    assert said.exit_code == 0, said.err
    monkeypatch.chdir(tmp_path)
    before = used(task, load(home / "run", device="cpu"))
    save(load(home / "run", device="cpu").meta_layer, tmp_path / "file")
    shutil.rmtree(home / "data")
    shutil.move(home / "run", tmp_path / "elsewhere")
    home.rmdir()
    torch.testing.assert_close(used(task, load("elsewhere", device="cpu")), before)
    torch.testing.assert_close(used(task, load("file", device="cpu")), before)


@pytest.mark.slow
def test_a_run_finds_its_data_from_another_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    write_data("table", home)
    typed = ("task=table", *WITH_DATA["table"], *SHORT, "evaluation=none", "run_dir=run")
    assert call(main, *typed, folder=home).exit_code == 0
    monkeypatch.chdir(tmp_path)
    task = load("home/run", device="cpu").meta_layer.task
    assert task.sample(1, "test", torch.Generator().manual_seed(0)).num_tasks == 1
    (home / "data").rename(home / "moved")
    task = load("home/run", device="cpu").meta_layer.task
    with pytest.raises(InvalidValue, match=r"path=data/schools\.csv: there is no such file"):
        task.sample(1, "test", torch.Generator().manual_seed(0))


def test_a_table_is_predicted_in_its_own_words(tmp_path):
    write_data("table", tmp_path)
    typed = ("task=table", *WITH_DATA["table"], *SHORT, "evaluation=none", "run_dir=run")
    assert call(main, *typed, folder=tmp_path).exit_code == 0
    shutil.rmtree(tmp_path / "data")
    estimator = FewShotRegressor.load(tmp_path / "run", device="cpu")
    names = [each.name for each in estimator.trained().meta_layer.task.column_encoding.inputs]
    rng = np.random.default_rng(0)
    task = estimator.trained().meta_layer.task
    frame = {
        each.name: [each.categories[0]] * 4 if hasattr(each, "categories") else rng.normal(size=4).tolist()
        for each in task.column_encoding.inputs
    }
    y = np.array([10.0, 12.0, 9.0, 11.0])
    values = estimator.fit(frame, y).predict(frame)
    assert values.shape == (4,)
    support = task.encode({**frame, task.target: y.tolist()})
    wanted = task.decode(Trained(estimator.trained().meta_layer).adapt(support).predict(support.x[0]))
    np.testing.assert_allclose(values, wanted, rtol=1e-4)
    with pytest.raises(InvalidData, match=f"must be a data frame, or a dictionary, with the columns {names[0]}"):
        FewShotRegressor.load(tmp_path / "run", device="cpu").fit(np.zeros((4, 99)), y)


def test_a_table_keeps_its_classes_whichever_the_support_set_holds(tmp_path):
    """Of two schools one has passed pupils alone: the other class stays a class, with its number of the training."""
    from tables import good_rows, table, write

    task = table(write(tmp_path / "t.csv", good_rows()), target="passed", ignore=["score"])
    torch.manual_seed(0)
    layer = Prototypes(MLP(task.spec, hidden=[4]), task)
    x = np.random.default_rng(0).normal(size=(4, *task.spec.x_shape))
    estimator = FewShotClassifier(layer).fit(x, ["yes"] * 4)
    assert estimator.classes_.tolist() == ["no", "yes"]
    found = Trained(layer).adapt(x, [1] * 4).predict(x).softmax(-1)
    np.testing.assert_allclose(estimator.predict_proba(x), found, atol=1e-6)
    with pytest.raises(InvalidData, match="y=perhaps: is none of the classes of the training: no, yes"):
        estimator.fit(x, ["yes", "no", "no", "perhaps"])


@pytest.mark.slow
def test_building_a_task_reads_nothing(tmp_path):
    for task, typed in WITH_DATA.items():
        build.build_task(small(f"task={task}", *typed))
    assert mlframework.FewShotClassifier is FewShotClassifier
