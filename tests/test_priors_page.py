"""The measured tables of docs/priors.md: their arithmetic by hand, and that the page shows what was measured."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def shown(name):
    page = (ROOT / "docs" / "priors.md").read_text(encoding="utf-8")
    return page.split(f"<!-- begin: scripts/{name}.py -->\n")[1].split("\n<!-- end -->")[0]


@pytest.mark.parametrize("name", ["small_tables", "prior_gaussian_process", "prior_speed"])
def test_the_page_shows_what_was_measured(script, name):
    module = script(name)
    assert shown(name) == "\n".join(module.drawn())


def fitted(classes, probabilities):
    return SimpleNamespace(classes_=np.array(classes), predict_proba=lambda x: np.array(probabilities))


def test_a_classifier_is_judged_by_the_formulas(script):
    module = script("small_tables")
    found = module.judged(fitted([0, 2], [[0.75, 0.25], [0.6, 0.4]]), np.zeros((2, 1)), np.array([0, 2]))
    assert found["error"] == 0.5
    # The class that was not met has the least probability, of which the others give up as much.
    least = module.LEAST
    assert found["log_loss"] == pytest.approx(-(np.log(0.75) + np.log(0.4)) / 2 + np.log(1 + least))


def test_no_row_is_both_learned_from_and_predicted(script):
    module = script("small_tables")
    table = module.read("iris")
    x = np.arange(len(table.y), dtype=float)[:, None]
    for size in module.sizes(table):
        for split in module.splits(table._replace(x=x), size):
            (support, labels), (query, _) = split.support, split.query
            assert len(support) == size and not set(support[:, 0]) & set(query[:, 0])
            assert np.bincount(labels).min() >= 2


def cells(losses):
    """Cells of two tables and two methods, two splits each."""
    for table, methods in losses.items():
        for method, values in methods.items():
            for value in values:
                yield {"method": method, "table": table, "support": 16, "log_loss": value, "error": value / 2}


def test_ranks_and_differences_are_over_tables(script):
    module = script("small_tables")
    network, other = module.NETWORK, "SVM"
    losses = {"a": {network: [0.2, 0.4], other: [0.5, 0.7]}, "b": {network: [0.5, 0.5], other: [0.2, 0.6]}}
    heading, _, *rows = module.summary(list(cells(losses)), 16)
    assert "2 tables" in heading
    columns = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ") for row in rows}
    assert columns[network][1] == "0.400" and columns[other][1] == "0.500"
    assert columns[network][2].startswith("1.5 ") and columns[other][2].startswith("1.5 ")
    # Differences of means: 0.3 and -0.1.
    assert columns[other][3].startswith("0.1 ")
    assert columns[network][3] == ""


def test_an_estimator_is_tuned_inside_the_support_set(script):
    module = script("small_tables")
    table = module.read("iris")
    split = next(module.splits(table, 32))
    search = module.tuned("k nearest", table, split)
    assert search.n_splits_ <= 5 and len(search.cv_results_["params"]) > 4
    assert module.judged(search, *split.query)["error"] < 0.4
