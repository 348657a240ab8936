"""A small table of schools, and tasks made of it."""

from __future__ import annotations

import csv

import numpy as np

from mlframework.tasks import Table

SPLITS = ("train", "validation", "test")
HEADER = ["school", "sex", "hours", "income", "score", "passed"]


def good_rows(schools=12, pupils=8, seed=0):
    """Rows of a table without faults, as lists of texts."""
    rng = np.random.default_rng(seed)
    rows = []
    for school in range(schools):
        for _ in range(pupils):
            hours, income = rng.normal(5, 2), rng.normal(3e4, 5e3)
            score = hours + school / 3 + rng.normal()
            passed = "yes" if score > 7 else "no"
            rows.append([f"s{school}", rng.choice(["f", "m"]), f"{hours:.3f}", f"{income:.1f}", f"{score:.3f}", passed])
    return rows


def write(path, rows, header=HEADER, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def with_column(rows, name, cell):
    """Rows and a header with another column, whose cells `cell(number, row)` gives."""
    return [[*row, cell(number, row)] for number, row in enumerate(rows)], [*HEADER, name]


def table(path, **settings):
    given = {"task_column": "school", "target": "score", "ignore": ["passed"], "k_shot": 3, "k_query": None}
    return Table(path, **{**given, **settings})


def classification(path, **settings):
    return table(path, **{"target": "passed", "ignore": ["score"], **settings})
