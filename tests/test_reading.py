"""Data that a process reads again, as the jobs of a sweep do, is read once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_damaged_files import READERS

from mlframework import reading
from mlframework.errors import UserError
from mlframework.reading import parsed_yaml, read_once
from mlframework.tasks import Table, TextFolder
from mlframework.tasks.ratings.rating_table import RatingTable
from mlframework.tasks.ratings.rating_tasks import RatingTasks


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch):
    monkeypatch.setattr(reading, "LAST_READ", {})


def test_the_same_file_is_read_once_and_a_changed_one_again(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("one")
    other.write_text("other")
    found = [read_once("text", [path], path.read_text), read_once("text", [path], None)]  # type: ignore[arg-type]
    assert found == ["one", "one"]
    assert read_once("upper", [path], lambda: path.read_text().upper()) == "ONE"
    path.write_text("two")
    os.utime(path, ns=(0, 1))
    assert read_once("text", [path], path.read_text) == "two"
    assert read_once("text", [other], other.read_text) == "other"


def test_only_the_last_ones_stay_in_memory(tmp_path):
    for number in range(5):
        read_once(number, [], lambda: "x")
    assert list(reading.LAST_READ) == [("3", ()), ("4", ())]
    read_once(3, [], None)  # type: ignore[arg-type]
    assert list(reading.LAST_READ) == [("4", ()), ("3", ())]


def test_an_object_that_does_not_say_what_it_is_keeps_nothing():
    assert [read_once(object(), [], lambda n=n: n) for n in range(2)] == [0, 1]
    assert not reading.LAST_READ


@pytest.mark.parametrize("end", ["", ".5"])
def test_a_number_in_base_60_has_few_places(end):
    """Its value would take a time that grows with the square of its length, and a float has no room for it."""
    path, number = Path("config.yaml"), "1:30:15"
    assert parsed_yaml(path, f"a: {number}{end}", dict)["a"] in (5415, 5415.5)
    with pytest.raises(UserError, match=r"config\.yaml: holds a number in base 60"):
        parsed_yaml(path, f"a: {number}{':1' * 1000}{end}", dict)


def of_text(path: Path) -> TextFolder:
    return TextFolder(path, k_shot=1, k_query=1, length=8)


def of_table(path: Path) -> Table:
    return Table(path, task_column="school", target="score", k_shot=2)


def of_ratings(path: Path) -> RatingTasks:
    return RatingTasks(source=RatingTable(path), ratings=[3, None], k_query=1)


@pytest.mark.parametrize(
    ("file", "task", "reads"),
    [
        ("texts as CSV", of_text, "mlframework.tasks.text.text_folder.read_text"),
        ("table as CSV", of_table, "mlframework.tasks.tables.table.read_table"),
        ("ratings as CSV", of_ratings, "mlframework.tasks.ratings.rating_table.read_text"),
    ],
)
def test_the_next_task_of_a_process_reads_nothing_and_draws_the_same(file, task, reads, tmp_path, monkeypatch):
    path = READERS[file].write(tmp_path)
    if file == "ratings as CSV":
        rows = [f"{user},{item},{1 + (user * item) % 5}" for user in range(30) for item in range(6)]
        path.write_text("\n".join(["user,item,rating", *rows]) + "\n")
    first = task(path).sample(2, "train", torch.Generator().manual_seed(0))
    monkeypatch.setattr(reads, None)
    assert task(path).sample(2, "train", torch.Generator().manual_seed(0)).hash() == first.hash()
    os.utime(path, ns=(0, 1))
    with pytest.raises(TypeError, match="not callable"):
        task(path).sample(2, "train", torch.Generator().manual_seed(0))


def test_a_users_own_source_of_ratings_is_read_anew(tmp_path):
    """It may read more than its path says; and in a notebook, a class of the same name may read otherwise."""
    path = tmp_path / "ratings.csv"
    rows = [f"u{user},i{item},{(user + item) % 5 + 1}" for user in range(20) for item in range(14)]
    path.write_text("\n".join(["user,item,rating", *rows]) + "\n")

    def table(most: float) -> RatingTasks:
        class Mine(RatingTable):
            def read(self):
                found = super().read()
                return found._replace(triples=[(u, i, min(r, most)) for u, i, r in found.triples])

        return RatingTasks(source=Mine(path))

    assert [table(most).table.rating.max() for most in (5.0, 3.0)] == [5.0, 3.0]
