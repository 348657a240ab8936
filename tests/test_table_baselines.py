"""Conventional estimators beside an algorithm: on each support set, and on the rows of all training tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from tables import classification, good_rows, table, write

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation import Conventional, Pooled, Predictions
from mlframework.evaluation.baselines.conventional import settings_of
from mlframework.evaluation.baselines.pooled import AddedRows, Shifted, Sloped, as_rows, logistic_around, training_rows
from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, raw_inputs
from mlframework.evaluation.displays.predictions import confusion, predicted_against_true
from mlframework.evaluation.task_set import TaskSet
from mlframework.runs import build
from mlframework.tasks import Sinusoid

FORESTS = {
    "classifier": RandomForestClassifier(5, random_state=0),
    "regressor": RandomForestRegressor(5, random_state=0),
}


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "schools.csv", good_rows())


def drawn(task, tasks=3):
    return task.sample(tasks, "test", torch.Generator().manual_seed(0))


def predicted(layer, episode):
    return layer.predict(layer.adapt(episode.support), episode.query.x)


# On each support set.


@pytest.mark.parametrize(
    ("make", "estimator"), [(table, Ridge()), (table, FORESTS["regressor"]), (classification, FORESTS["classifier"])]
)
def test_a_fitted_estimator_predicts_as_scikit_learn_does(good, make, estimator):
    task = make(good, k_shot=6)
    episode = drawn(task)
    found = predicted(FittedEstimators(raw_inputs(), task, estimator=estimator), episode)
    for number in range(3):
        support, query = (part.x[number, part.mask[number] > 0].numpy() for part in episode)
        y = episode.support.y[number].flatten().numpy()
        if len(set(y)) > 1:
            expected = estimator.fit(support, y).predict(query)
            ours = found[number, episode.query.mask[number] > 0]
            ours = ours[:, 0] if make is table else ours.argmax(-1)
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_support_set_of_one_class_gives_that_class(good):
    task = classification(good)
    episode = drawn(task)
    same = episode._replace(support=episode.support._replace(y=torch.ones_like(episode.support.y)))
    for estimator in (LogisticRegression(), FORESTS["classifier"], KNeighborsClassifier(9)):
        found = predicted(FittedEstimators(raw_inputs(), task, estimator=estimator), same)
        assert (found.argmax(-1) == 1).all() and found.isfinite().all()


def test_there_are_at_most_as_many_neighbours_as_examples(good):
    task = classification(good, k_shot=3)
    found = predicted(FittedEstimators(raw_inputs(), task, estimator=KNeighborsClassifier(50)), drawn(task))
    assert found.isfinite().all()


def test_a_grid_is_of_the_settings_that_an_estimator_has():
    grid = {"C": [1.0, 2.0], "alpha": [0.5]}
    assert [(named, e.C) for named, e in settings_of(LogisticRegression(), grid)] == [("C=1.0", 1.0), ("C=2.0", 2.0)]
    assert [named for named, _ in settings_of(Ridge(), grid)] == ["alpha=0.5"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"grid": {"depth": [1]}}, "grid={'depth': .1.}: no estimator has depth"),
        ({"regressor": LogisticRegression()}, "regressor=LogisticRegression: takes a classification, and Table is"),
        ({"regressor": 7}, "regressor=7: must be a scikit-learn estimator"),
        ({"tasks": 0}, "tasks=0"),
    ],
)
def test_a_wrong_setting_is_named(good, settings, line):
    with pytest.raises(InvalidValue, match=line):
        Conventional(**{**FORESTS, "grid": {}, **settings}).check(table(good))


# On all training rows.


def test_the_training_rows_are_those_of_the_table(good):
    task = table(good)
    rows = training_rows(task, 1)
    assert np.array_equal(rows.x, task.rows("train").x.numpy()) and np.array_equal(rows.y, task.rows("train").y[:, 0])


def test_other_tasks_are_drawn_to_be_pooled():
    task = Sinusoid(k_shot=2, k_query=3)
    rows = training_rows(task, 4)
    assert rows.x.shape == (20, 1) and rows.y.shape == (20,)
    episodes = TaskSet(task, "train", tasks=4, seed=2)
    expected = torch.cat([episode.joined().x.flatten() for episode in episodes])
    assert np.array_equal(rows.x[:, 0], expected.numpy())


def test_infinite_strength_leaves_the_pooled_predictions_as_they_are(good):
    task = table(good)
    estimator = HistGradientBoostingRegressor(max_iter=5).fit(*training_rows(task, 1))
    episode = drawn(task)
    found = predicted(Shifted(task, estimator, math.inf), episode)
    expected = estimator.predict(episode.query.x.flatten(0, 1).numpy()).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_shift_of_a_regression_is_a_shrunken_mean_residual(good):
    task = table(good, k_shot=[2, 5])
    estimator = Ridge().fit(*training_rows(task, 1))
    episode = drawn(task)
    found = predicted(Shifted(task, estimator, 3.0), episode)
    for number, (x, y, mask) in enumerate(zip(*episode.support, strict=True)):
        own = mask > 0
        residuals = y[own, 0].numpy() - estimator.predict(x[own].numpy())
        expected = estimator.predict(episode.query.x[number].numpy()) + residuals.sum() / (int(own.sum()) + 3)
        np.testing.assert_allclose(found[number, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_shift_of_a_classification_weighs_classes_by_observed_over_expected(good):
    task = classification(good, k_shot=[2, 5])
    estimator = LogisticRegression().fit(*training_rows(task, 1))
    episode = drawn(task)
    found = predicted(Shifted(task, estimator, 2.0), episode).softmax(-1)
    for number, (x, y, mask) in enumerate(zip(*episode.support, strict=True)):
        own = mask > 0
        expected = estimator.predict_proba(x[own].numpy()).sum(0)
        observed = np.bincount(y[own].numpy(), minlength=2)
        weighed = estimator.predict_proba(episode.query.x[number].numpy()) * (observed + 2) / (expected + 2)
        np.testing.assert_allclose(found[number], weighed / weighed.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_added_rows_are_weighed_beside_all_training_rows(good):
    task = table(good, k_shot=[2, 5])
    rows, episode = training_rows(task, 1), drawn(task)
    found = predicted(AddedRows(task, Ridge(), rows, 7.0), episode)
    for number, (x, y, mask) in enumerate(zip(*episode.support, strict=True)):
        own = as_rows(x[mask > 0], y[mask > 0])
        repeated = Ridge().fit(np.concatenate([rows.x, *[own.x] * 7]), np.concatenate([rows.y, *[own.y] * 7]))
        np.testing.assert_allclose(found[number, :, 0], repeated.predict(episode.query.x[number].numpy()), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"support": ["shft"]}, r"support=\['shft'\]: must hold none, shift, slopes, added \(did you mean shift\?\)"),
        ({"strengths": [0]}, "strengths=.0.: must hold numbers above 0"),
        ({"weights": []}, r"weights=\[\]: must hold numbers above 0"),
        ({"classifier": KNeighborsClassifier()}, "classifier=KNeighborsClassifier: takes no weights of rows"),
    ],
)
def test_a_wrong_setting_of_pooling_is_named(good, settings, line):
    with pytest.raises(InvalidValue, match=line):
        Pooled(**{**FORESTS, "grid": {}, **settings}).check(classification(good))


@pytest.mark.parametrize("task", ["score", "passed"])
def test_every_preset_has_its_rows_in_a_report(good, task):
    """Settings are few and forests small, but each baseline of conf/ is built by its yaml and judged."""
    names = ["linear", "nearest_neighbours", "support_vectors", "random_forest", "gradient_boosting"]
    pooled = ["pooled_linear", "pooled_gradient_boosting"]
    typed = ["task=table", f"task.path={good}", "task.task_column=school", f"task.target={task}", "task.k_shot=3"]
    few = ["evaluation.tasks=3", "evaluation.validation_tasks=2", "base_layer.hidden=[4]"]
    chosen = f"evaluation/baseline=[{','.join([*names, *pooled])}]"
    small = [f"evaluation.baseline.{name}.tasks=2" for name in pooled]
    small += [f"evaluation.baseline.{name}.support=[none,shift,added]" for name in pooled]
    grid = ["evaluation.baseline.pooled_gradient_boosting.grid={max_iter:[2]}"]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [*typed, *few, chosen, *small, *grid])
    made = build.build_task(config)
    layer = build.build_meta_layer(config, made)
    report = build.build_evaluation(config).run("maml", layer, lambda: None, torch.device("cpu"))
    methods = [row.method for row in report.rows]
    shown = [f"{name.replace('_', ' ')}{way}" for name in pooled for way in ("", ", support shift", ", support added")]
    assert methods == ["maml", *(name.replace("_", " ") for name in names), *shown]
    assert [row.tasks for row in report.rows][-3:] == [3, 3, 2]
    assert all(row.metrics["query_loss"][0].mean is not None for row in report.rows)


# The display.


def some_layer(task, good):
    typed = ["task=table", f"task.path={good}", "task.task_column=school", f"task.target={task}", "task.k_shot=3"]
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", typed)
    return build.build_meta_layer(config, build.build_task(config))


def test_a_figure_has_predicted_against_true_before_and_after(good):
    layer = some_layer("score", good)
    episode = drawn(layer.task)
    before, after = predicted_against_true(layer, episode).axes
    assert [axes.get_title() for axes in (before, after)] == ["before adaptation", "after 10 inner steps"]
    points = np.concatenate([np.asarray(each.get_offsets()) for each in before.collections])
    kept = episode.query.mask > 0
    np.testing.assert_allclose(points[:, 0], episode.query.y[kept][:, 0], rtol=1e-6)
    with torch.no_grad():
        path = list(layer.trajectory(episode.support, 10))
        expected = layer.predict(path[0], episode.query.x)[kept][:, 0]
    np.testing.assert_allclose(points[:, 1], expected, rtol=1e-4, atol=1e-5)


def test_classes_are_counted_in_a_table_of_predicted_by_true():
    y = torch.tensor([[0, 0, 1, 2]])
    logits = torch.eye(3)[torch.tensor([[0, 1, 1, 2]])]
    query = Examples(torch.zeros(1, 4, 1), y, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert confusion(logits, Episode(query, query)).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_a_figure_of_classes_names_every_count(good):
    layer = some_layer("passed", good)
    episode = drawn(layer.task)
    _, after = predicted_against_true(layer, episode).axes
    assert sum(int(text.get_text()) for text in after.texts) == int(episode.query.mask.sum())


def test_predictions_are_for_numbers_and_classes():
    from mlframework.tasks import TextLists

    with pytest.raises(UserError, match="is for a classification or a regression, and TextLists is a sequence"):
        Predictions().check(TextLists(k_shot=1, k_query=1, length=8))


def test_logistic_regression_around_pooled_logits_is_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    offset = 2 * torch.randn(3, 9, 3, generator=generator, dtype=torch.float64)
    targets = F.one_hot(torch.randint(3, (3, 9), generator=generator), 3).double()
    mask = (torch.arange(9) < torch.tensor([9, 6, 1])[:, None]).double().unsqueeze(-1)
    penalty = torch.tensor([0.3, 1.0, 3.0, 0.3], dtype=torch.float64)
    found = logistic_around(offset, x, targets, mask, penalty).requires_grad_()
    losses = (
        -((offset + x @ found).log_softmax(-1) * targets * mask).sum() + (penalty[:, None] * found.square()).sum() / 2
    )
    (gradient,) = torch.autograd.grad(losses, found)
    assert gradient.abs().max() < 1e-9


def test_slopes_of_a_regression_are_those_of_ridge_regression_of_the_residuals():
    task = Sinusoid(k_shot=6, k_query=4)
    pooled = Ridge().fit(*training_rows(task, 20))
    support, query = task.sample(2, "test", torch.Generator().manual_seed(0))
    layer = Sloped(task, pooled, intercept=1e-9, slopes=2.0)
    found = layer.predict(layer.adapt(support), query.x)
    for number in range(2):
        x, y, asked = (each[number].double().numpy() for each in (support.x, support.y, query.x))
        own = Ridge(alpha=2.0).fit(x, y - pooled.predict(x).reshape(-1, 1))
        wanted = pooled.predict(asked).reshape(-1, 1) + own.predict(asked).reshape(-1, 1)
        assert np.allclose(found[number].numpy(), wanted, atol=1e-4)
