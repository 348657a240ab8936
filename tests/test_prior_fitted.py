"""A prior-fitted network as a classifier of a table."""

import numpy as np
import pytest
import torch

from mlframework.base_layers import MLP, LinearModel
from mlframework.episode import Examples
from mlframework.errors import InvalidValue, UserError
from mlframework.meta_layers import InContext
from mlframework.runs import FewShotClassifier, TableClassifier, Trained, save, train
from mlframework.runs.prior_fitted import most_telling
from mlframework.tasks import Digits, LinearTables, Sinusoid, TablePrior

WIDTH = 4


def prior():
    settings = {"columns": [1, WIDTH], "k_shot": [10, 30], "k_query": 20, "classes": [2, 3], "categorical": 0.0}
    return TablePrior(kind="classification", generator={"linear": LinearTables()}, noise=0.05, **settings)


@pytest.fixture(scope="module")
def network():
    """Trained for a few seconds on linear tables."""
    torch.manual_seed(0)
    task = prior()
    layer = InContext(LinearModel(task.spec), task, width=32, depth=2, heads=4)
    train(layer, steps=120, meta_batch=16, lr=3e-3)
    return layer


def table(classes, seed, rows=60, columns=3):
    rng = np.random.default_rng(seed)
    x = 5 + 3 * rng.normal(size=(rows, columns))
    scores = (x - 5) @ rng.normal(size=(columns, classes))
    return x, np.array(["ape", "bee", "cat"])[scores.argmax(1)]


@pytest.mark.parametrize("classes", [2, 3])
def test_it_learns_linear_tables_and_has_the_classes_of_the_table(network, classes):
    accuracies = []
    for seed in range(20):
        x, y = table(classes, seed)
        fitted = TableClassifier(network).fit(x[:30], y[:30])
        found = fitted.predict_proba(x[30:])
        assert fitted.classes_.tolist() == sorted(set(y[:30]))
        np.testing.assert_allclose(found.sum(1), 1)
        assert (fitted.predict(x[30:]) == fitted.classes_[found.argmax(1)]).all()
        accuracies.append((fitted.predict(x[30:]) == y[30:]).mean())
    assert np.mean(accuracies) > (0.75 if classes == 2 else 0.65)


def test_more_support_rows_than_in_training_help(network):
    few, many = [], []
    for seed in range(20):
        x, y = table(2, seed, rows=200)
        for rows, found in ((8, few), (120, many)):
            found.append((TableClassifier(network).fit(x[:rows], y[:rows]).predict(x[120:]) == y[120:]).mean())
    assert np.mean(many) > np.mean(few) + 0.03


def test_scales_of_columns_and_other_queries_do_not_matter(network):
    x, y = table(3, 0)
    found = TableClassifier(network).fit(x[:30], y[:30]).predict_proba(x[30:])
    other = x * [10.0, 0.1, 3.0] + [5.0, -2.0, 0.0]
    np.testing.assert_allclose(
        TableClassifier(network).fit(other[:30], y[:30]).predict_proba(other[30:]), found, atol=1e-4
    )
    alone = TableClassifier(network).fit(x[:30], y[:30]).predict_proba(x[30:31])
    np.testing.assert_allclose(alone, found[:1], atol=1e-5)


def test_many_members_depend_less_on_the_order_of_columns(network):
    x, y = table(3, 1)

    def change(members):
        one, other = (
            TableClassifier(network, members=members).fit(each[:30], y[:30]).predict_proba(each[30:])
            for each in (x, x[:, ::-1])
        )
        return np.abs(one - other).mean()

    assert change(32) < 0.7 * change(1)


def test_one_member_predicts_what_the_network_does(network):
    """By hand: columns standardised by the support rows, padded, no permutation."""
    x, y = table(3, 2)
    z = (x - x[:30].mean(0)) / x[:30].std(0)
    inputs = np.zeros((60, WIDTH))
    inputs[:, :3] = z.clip(-5, 5) * np.sqrt(WIDTH / 3)
    labels = np.unique(y[:30], return_inverse=True)[1]
    support = Examples(torch.from_numpy(inputs[None, :30]).float(), torch.from_numpy(labels)[None], torch.ones(1, 30))
    logits = Trained(network).adapt(support).predict(inputs[30:])
    found = TableClassifier(network, members=1).fit(x[:30], y[:30]).predict_proba(x[30:])
    np.testing.assert_allclose(found, logits.softmax(-1), atol=1e-5)
    # The run scales a table by itself.
    plain = Trained(network).adapt(x[:30], labels).predict(x[30:]).softmax(-1)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    np.testing.assert_allclose(FewShotClassifier(network).fit(x[:30], y[:30]).predict_proba(x[30:]), found, atol=1e-5)


def test_missing_values_are_the_medians_of_the_rows_kept(network):
    x, y = table(2, 3)
    holes = x.copy()
    holes[[3, 40], 1] = np.nan
    filled = holes.copy()
    filled[[3, 40], 1] = np.nanmedian(holes[:30, 1])
    found, wanted = (TableClassifier(network).fit(z[:30], y[:30]).predict_proba(z[30:]) for z in (holes, filled))
    np.testing.assert_allclose(found, wanted)


def test_of_too_many_columns_those_that_tell_most_are_kept():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    x = rng.normal(size=(40, 6))
    x[:, 4] += 5 * labels
    x[:, 1] -= 4 * labels
    x[:, 3] = 7.0
    assert most_telling(x, labels, 2).tolist() == [1, 4]
    assert most_telling(x, labels, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert 3 not in most_telling(x, labels, 5)


#: Rows of more columns than are kept, their labels, and the columns that are.
FEW_STATISTICS = {
    "all columns are constant": (np.ones((6, 10)), [0, 1] * 3, [0, 1, 2, 3]),
    "all are constant, and no binary fraction": (np.full((6, 10), 0.1), [0, 1] * 3, [0, 1, 2, 3]),
    "one class": (np.eye(6)[:, ::-1], [0] * 6, [0, 1, 2, 3]),
    "a class for each row": (np.hstack([np.ones((5, 2)), np.eye(5)]), range(5), [2, 3, 4, 5]),
    "a column is the class": (np.hstack([np.ones((6, 4)), [[0.0], [1.0]] * 3]), [0, 1] * 3, [0, 1, 2, 4]),
}


@pytest.mark.parametrize("kind", FEW_STATISTICS)
def test_columns_are_kept_in_order_where_the_classes_have_no_statistic(kind):
    x, labels, columns = FEW_STATISTICS[kind]
    assert most_telling(x, np.array(labels), 4).tolist() == columns


def test_a_table_of_many_constant_columns_has_equal_probabilities(network):
    found = TableClassifier(network).fit(np.ones((6, 10)), [0, 1] * 3).predict_proba(np.ones((2, 10)))
    np.testing.assert_allclose(found[0], found[1])


def test_a_saved_network_predicts_the_same(network, tmp_path):
    x, y = table(2, 4)
    save(network, tmp_path / "network.safetensors")
    found = TableClassifier(tmp_path / "network.safetensors").fit(x[:30], y[:30]).predict_proba(x[30:])
    np.testing.assert_allclose(found, TableClassifier(network).fit(x[:30], y[:30]).predict_proba(x[30:]), atol=1e-6)


X, Y = np.zeros((6, 2)), np.arange(6) % 2


@pytest.mark.parametrize(
    ("x", "y", "line"),
    [
        (X, Y[:5], "y=5 labels: must be one for each of 6 inputs"),
        (X[:0], Y[:0], "Found array with 0 sample"),
        (X[0], Y, "Expected 2D array, got 1D array instead"),
        (X, np.arange(6), r"y=6 classes: the network was trained on at most 3: task.classes=\[2,6\]"),
        (X + np.inf, Y, "x=infinity: is no number of a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(network, x, y, line):
    with pytest.raises(ValueError, match=line):
        TableClassifier(network).fit(x, y)


def test_queries_with_other_columns_are_refused(network):
    with pytest.raises(ValueError, match="X has 3 features, but TableClassifier is expecting 2 features"):
        TableClassifier(network).fit(np.random.default_rng(0).normal(size=(6, 2)), Y).predict(np.zeros((1, 3)))


def test_a_network_for_something_else_is_refused():
    task = Sinusoid()
    layer = InContext(LinearModel(task.spec), task, width=8, depth=1, heads=2)
    with pytest.raises(InvalidValue, match="was trained on regression tasks: use FewShotRegressor"):
        TableClassifier(layer).fit(X, Y)
    digits = Digits(n_way=2, k_shot=1, k_query=1)
    with pytest.raises(InvalidValue, match="must be trained on classifications of tables"):
        TableClassifier(InContext(MLP(digits.spec), digits, width=8, depth=1, heads=2)).fit(X, Y)


def test_the_file_of_a_network_is_saved_and_not_its_rows(network, tmp_path):
    with pytest.raises(UserError, match=r"mlframework\.save writes the network"):
        TableClassifier(network).fit(*table(2, 0)).save(tmp_path / "file")
