"""Data that a process reads again, as the jobs of a sweep do, is read once."""

from __future__ import annotations

import csv
import io
import os
import threading
from pathlib import Path

import pytest
import torch
from test_damaged_files import READERS

from mlframework import reading
from mlframework.errors import UserError
from mlframework.reading import parsed_csv, parsed_yaml, read_once
from mlframework.tasks import Table, TextFolder
from mlframework.tasks.ratings.rating_table import RatingTable
from mlframework.tasks.ratings.rating_tasks import RatingTasks
from mlframework.tasks.tables.read_table import read_table


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


# CSV.


def test_a_cell_may_be_as_long_as_its_file(tmp_path):
    """A book in one cell; csv's own bound, which other packages may rely on, stays as it is."""
    book, before = "so it goes on, and on\n" * 20_000, csv.field_size_limit()
    texts, table, ratings = (tmp_path / name for name in ("texts.csv", "table.csv", "ratings.csv"))
    texts.write_text("task,text\n" + "".join(f'{name},"{book}"\n' for name in "abc"))
    table.write_text("task,y,note\n" + "".join(f'{row % 4},{row},"{book}"\n' for row in range(3)))
    ratings.write_text(f'user,item,rating,note\nu,i,3,"{book}"\n')
    task = TextFolder(texts, k_shot=2, k_query=2, length=16)
    assert [source.texts for source in task.sources("train")] == [[book.strip()]]
    assert read_table(table)["note"] == [book.strip()] * 3
    assert RatingTable(ratings, user_attributes=["note"]).read().users == {"u": {"note": book.strip()}}
    assert csv.field_size_limit() == before


def test_threads_that_read_at_once_leave_the_bound_of_cells_as_it_is():
    text, before, found = f'a,"{"x" * 200_000}"\n' * 20, csv.field_size_limit(), []
    threads = [threading.Thread(target=lambda: found.extend(parsed_csv(text, "x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and csv.field_size_limit() == before


@pytest.mark.parametrize("rows", [1, 20_000])
def test_a_quote_that_is_not_closed_does_not_make_one_cell_of_the_rest(tmp_path, rows):
    path = tmp_path / "t.csv"
    path.write_text('task,text\na,first\nb,"second\n' + "c,third of many\n" * rows)
    for read in (TextFolder(path, k_shot=1, k_query=1, length=4).sources, lambda _: read_table(path)):
        with pytest.raises(UserError, match=r"t\.csv: line 3: cannot be read as CSV \(a cell begins with a quote"):
            read("train")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_the_rows_of_a_csv_are_those_of_pythons_own_reader(end):
    text = 'a,b\r\n"x\n""y""",\n\n5" wide,"é\u2028",more\n"last","one"' + end
    rows = list(parsed_csv(text, "x"))
    assert [row for _, row in rows] == list(csv.reader(io.StringIO(text, newline="")))
    assert [line for line, _ in rows][:4] == [1, 3, 4, 5]
