"""Few-shot tasks from the tables in scikit-learn: their episodes and standardisation, and the settings they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import datasets

from mlframework.errors import InvalidValue
from mlframework.tasks import SklearnTables
from mlframework.tasks.tables.sklearn_tables import by_support, loaded
from mlframework.testing import check_task_distribution

SPLITS = ("train", "validation", "test")


def drawn(task, split="test", tasks=8, seed=0):
    return task.sample(tasks, split, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [{}, {"n_way": 3, "k_shot": [1, 4]}, {"kind": "regression"}, {"columns": 1}])
def test_the_tasks_keep_the_contract(settings):
    if settings.get("n_way") == 3:
        settings = {**settings, "train": ["digits"]}
    check_task_distribution(SklearnTables(**settings), inputs_repeat=True)


def test_classes_are_numbered_anew_in_every_task():
    """The mean of the first column of the two classes of one pair is now larger for class 0, now for class 1."""
    task = SklearnTables(train=["breast_cancer"], columns=1, k_shot=40, k_query=1)
    x, y, _ = drawn(task, "train", 30).support
    larger = [float(a[b == 0].mean() - a[b == 1].mean()) > 0 for a, b in zip(x[..., 0], y, strict=True)]
    assert 5 < sum(larger) < 25


def test_a_task_holds_rows_of_its_table_in_as_many_classes(monkeypatch):
    """Undone, the standardisation gives rows of wine, of the class that the task says."""
    kept = []
    monkeypatch.setattr(
        "mlframework.tasks.tables.sklearn_tables.by_support", lambda values, support: kept.append(values) or values
    )
    x, y = datasets.load_wine(return_X_y=True)
    episode = drawn(SklearnTables(columns=13, k_shot=2, k_query=3), tasks=4)
    for number, rows in enumerate(kept):
        labels = episode.tasks([number]).joined().y[0].numpy()
        found = [int(np.flatnonzero((np.sort(x, 1) == np.sort(row.numpy())).all(1))[0]) for row in rows]
        assert len(set(found)) == 10
        assert {(int(y[row]), int(label)) for row, label in zip(found, labels, strict=True)} >= {
            (int(y[found[0]]), 0),
            (int(y[found[1]]), 1),
        }
        assert len({(int(y[row]), int(label)) for row, label in zip(found, labels, strict=True)}) == 2


def test_a_regression_predicts_a_column_from_others():
    task = SklearnTables(kind="regression", test=["diabetes"], k_shot=8, k_query=20)
    episode = drawn(task, tasks=3)
    assert episode.support.y.shape == (3, 8, 1) and episode.query.x.shape == (3, 20, 3)
    torch.testing.assert_close(episode.support.y.mean(1), torch.zeros(3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(episode.support.y.std(1, correction=0), torch.ones(3, 1), atol=1e-4, rtol=0)


def test_the_support_rows_that_count_say_the_scale():
    task = SklearnTables(k_shot=[2, 6])
    episode = drawn(task)
    for x, mask in zip(episode.support.x, episode.support.mask, strict=True):
        own = x[mask > 0]
        spread = own.std(0, correction=0)
        torch.testing.assert_close(own.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(spread, torch.ones(3), atol=1e-4, rtol=0)


def test_numbers_are_standardised_by_the_support_set_and_cut_off():
    support = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    found = by_support(torch.tensor([[2.0, 4.0], [4.0, 6.0], [99.0, 0.0]]), support)
    assert found.tolist() == [[0.0, 0.0], [2.0, 0.5], [5.0, -1.0]]


def test_columns_that_hardly_vary_are_left_out():
    digits = loaded("digits")
    x = datasets.load_digits(return_X_y=True)[0]
    kept = [column for column in x.T if np.unique(column, return_counts=True)[1].max() <= len(x) / 2]
    assert 20 < digits.x.shape[1] == len(kept) < 64
    assert loaded("wine").x.shape == (178, 13)


def test_splits_share_no_table():
    task = SklearnTables()
    names = [table.name for split in SPLITS for table in task.tables(split)]
    assert sorted(names) == ["breast_cancer", "digits", "iris", "wine"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"train": ["wein"]}, r"train=\['wein'\]: must hold some of iris, wine, .*\(did you mean wine\?\)"),
        ({"train": ["wine"]}, r"test=\['wine'\]: wine is in the train split as well"),
        ({"train": []}, r"train=\[\]: must hold some of"),
        ({"train": ["diabetes"]}, r"train=\['diabetes'\]: must hold some of .* for a classification"),
        ({"kind": "ranking"}, "kind=ranking: must be classification or regression"),
        ({"n_way": 1}, "n_way=1: must be a whole number of at least 2"),
        ({"columns": 0}, "columns=0: must be a whole number of at least 1"),
        ({"k_shot": 0}, "k_shot=0: must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings, line):
    with pytest.raises(InvalidValue, match=line):
        SklearnTables(**settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"columns": 14}, "columns=14: wine has 13 that vary"),
        ({"columns": 13, "kind": "regression"}, "columns=13: wine has 12 that vary"),
        ({"n_way": 4}, "n_way=4: wine has 3 classes"),
        ({"k_shot": 40, "k_query": 10}, "k_query=10: wine has 48 rows of its smallest class, and 40 are support rows"),
    ],
)
def test_more_than_a_table_holds_is_refused_when_it_is_read(settings, line):
    with pytest.raises(InvalidValue, match=line):
        SklearnTables(**settings).sample(1, "test", torch.Generator())
