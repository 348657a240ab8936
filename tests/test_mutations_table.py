"""The table of mutations is not stale; `tests/mutations/run.py` runs it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from mutations.table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@cache
def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def names_of(file: str) -> set[str]:
    """The names of the tests of a file, with that of their class."""
    found: set[str] = set()
    for node in ast.parse(text(file)).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + each.name for each in inside if isinstance(each, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_mutation_changes_one_line_that_stands_once_and_names_a_test(mutation: Mutation):
    assert text(mutation.file).count(mutation.old) == 1
    old, new = mutation.old.split("\n"), mutation.new.split("\n")
    assert sum(one != other for one, other in zip(old, new, strict=True)) == 1
    file, _, test = mutation.test.partition("::")
    assert test.partition("[")[0] in names_of(file)


def test_there_are_sixty_mutations_with_names_of_their_own():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 60
