"""A user's own texts: what is read, what is left out, and which split it is in."""

from __future__ import annotations

import json
import logging
import re
from itertools import chain

import pytest
import torch

from mlframework.errors import InvalidValue, UserError
from mlframework.tasks import TextFolder
from mlframework.testing import check_task_distribution

SPLITS = ("train", "validation", "test")
SENTENCES = {
    "english": "the quick brown fox number {} jumps over the lazy dog",
    "greek": "η γρήγορη καφέ αλεπού {} πηδάει πάνω από το σκυλί",
    "russian": "быстрая рыжая лиса {} прыгает через собаку",
    "japanese": "素早い茶色の狐{}がのろまな犬を飛び越える",
    "hebrew": "השועל החום המהיר {} קופץ מעל הכלב",
    "arabic": "الثعلب البني السريع {} يقفز فوق الكلب",
    "thai": "สุนัขจิ้งจอกสีน้ำตาล {} กระโดดข้ามสุนัข",
}


def text_folder(path, *, k_shot=2, k_query=2, length=16, **settings):
    return TextFolder(path, k_shot=k_shot, k_query=k_query, length=length, **settings)


def lines(name, count=12):
    return [SENTENCES[name].format(number) for number in range(count)]


def fill(root):
    """A file of a dozen lines in each of several scripts."""
    root.mkdir()
    for name in SENTENCES:
        (root / f"{name}.txt").write_text("\n".join(lines(name)), encoding="utf-8")
    return root


def sources(task):
    return {source.name: list(source.texts) for split in SPLITS for source in task.sources(split)}


@pytest.mark.parametrize("running", [True, False])
def test_a_folder_in_many_scripts_keeps_the_contract(tmp_path, running):
    task = text_folder(fill(tmp_path / "mine"), running=running)
    check_task_distribution(task)
    assert sources(task) == {f"{name}.txt": lines(name) for name in SENTENCES}


def test_bad_files_are_named_in_one_line_each_and_the_rest_is_used(tmp_path, caplog):
    mine = fill(tmp_path / "mine")
    (mine / "empty.txt").write_text("")
    (mine / "blank.txt").write_text(" \n\n")
    (mine / "binary.txt").write_bytes(b"text\0\1\2")
    (mine / "short.txt").write_text("too short")
    (mine / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    caplog.set_level(logging.WARNING)
    task = text_folder(mine)
    assert set(sources(task)) == {f"{name}.txt" for name in SENTENCES}
    said = [record.getMessage() for record in caplog.records]
    for line in (
        f"{mine}/empty.txt: is empty: left out",
        f"{mine}/blank.txt: is empty: left out",
        f"{mine}/binary.txt: is binary (byte 4 is 0), and text in UTF-8 is expected: left out",
        f"{mine}/latin1.txt: is no UTF-8 at byte 1 (0xe9): save it as UTF-8: left out",
        f"{mine}: short.txt: too short, 0 rows of 16 tokens, and 2 + 2 are needed: left out",
    ):
        assert said.count(line) == 1, (line, said)
    assert len(said) == 5


def test_a_folder_is_one_task_of_all_its_files_and_hidden_ones_are_passed_over(tmp_path):
    mine = tmp_path / "mine"
    for name in SENTENCES:
        (mine / name / "more").mkdir(parents=True)
        (mine / name / "a.txt").write_text("\n".join(lines(name, 6)), encoding="utf-8")
        (mine / name / "more" / "b.txt").write_text("\n".join(lines(name)[6:]), encoding="utf-8")
        (mine / name / ".notes").write_text("not a text of mine\n" * 9)
    (mine / ".git").mkdir()
    (mine / ".git" / "config").write_text("not a text of mine\n" * 9)
    assert sources(text_folder(mine)) == {name: lines(name) for name in SENTENCES}


@pytest.mark.parametrize(
    ("unit", "texts"),
    [("line", ["a", "b", "c"]), ("paragraph", ["a\nb", "c"]), ("file", ["a\nb\n\nc"])],
)
def test_the_unit_says_what_a_text_is(tmp_path, unit, texts):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in "xyz":
        (mine / name).write_bytes(b"\xef\xbb\xbfa\r\nb\r\n\r\nc\r\n")  # with a byte order mark, as some editors write
    task = text_folder(mine, unit=unit, k_shot=1, k_query=1, length=2)
    assert sources(task) == dict.fromkeys("xyz", texts)


@pytest.mark.parametrize("count", [3, 4, 5, 20])
def test_every_split_has_a_task_and_no_task_two(tmp_path, count):
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(count):
        (mine / f"{number}.txt").write_text("\n".join(lines("english")))
    task = text_folder(mine)
    names = [[source.name for source in task.sources(split)] for split in SPLITS]
    assert all(names) and sorted(chain(*names)) == sorted(f"{number}.txt" for number in range(count))


def test_splits_that_are_given_share_no_task(tmp_path):
    for split in ("train", "val", "test"):
        fill(tmp_path / split)
    where = r"(train|val|test)/arabic\.txt"
    with pytest.raises(UserError, match=rf"{where}: is also at .*{where}: a task has one split"):
        text_folder(tmp_path).sources("train")


def test_a_file_beside_the_folders_of_splits_is_named(tmp_path, caplog):
    for split in ("train", "val", "test"):
        fill(tmp_path / split)
        for number, name in enumerate(SENTENCES):
            if number % 3 != ("train", "val", "test").index(split):
                (tmp_path / split / f"{name}.txt").unlink()
    (tmp_path / "latin.txt").write_text("lorem ipsum\n" * 99)
    assert set(sources(text_folder(tmp_path))) == {f"{name}.txt" for name in SENTENCES}
    assert f"{tmp_path}/latin.txt: stands beside folders of splits: left out" in caplog.text


def test_a_given_split_without_a_task_is_named(tmp_path):
    fill(tmp_path / "train")
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="there is no task for validation that can be used"):
        text_folder(tmp_path).sources("train")


@pytest.mark.parametrize("trial", range(4))
def test_only_declared_settings_move_a_task_to_another_split(tmp_path, trial):
    """Tasks are of all lengths, so that each setting leaves out others."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(24):
        text = "\n\n".join(f"{trial} {number} says {line}" for line in range(1 + number))
        (mine / f"{trial}_{number}.txt").write_text(text)
    own = {split: set(names(text_folder(mine, k_shot=5, k_query=5), split)) for split in SPLITS}
    assert 10 < sum(map(len, own.values())) < 24
    for settings in ({}, {"k_shot": 1}, {"k_query": 3}, {"length": 5}, {"running": False}, {"unit": "paragraph"}):
        task = text_folder(mine, **settings)
        for split in SPLITS:
            assert not own[split] & {name for other in SPLITS if other != split for name in names(task, other)}
    assert TextFolder.divided_by == ("task_column", "text_column")


def names(task, split):
    return [source.name for source in task.sources(split)]


def test_a_split_whose_tasks_are_all_too_short_is_named_with_them(tmp_path):
    """Others in their place would depend on the settings that say what is too short."""
    mine = fill(tmp_path / "mine")
    short = names(text_folder(mine), "validation")
    for name in short:
        (mine / name).write_text("short")
    told = re.escape(f"no task for validation has 4 rows of 16 tokens ({', '.join(short)}): remove short ones")
    with pytest.raises(UserError, match=told):
        text_folder(mine).sources("train")


def test_a_subclass_does_not_get_the_rows_of_another_class(tmp_path):
    mine = fill(tmp_path / "mine")
    text_folder(mine).sources("train")

    class One(TextFolder):
        def load(self, split):
            return super().load(split)[:1]

    task = One(mine, k_shot=2, k_query=2, length=16)
    assert len(task.sources("train")) == 1 and len(text_folder(mine).sources("train")) > 1
    assert len(text_folder(mine, k_shot=1).sources("train")) > 1


def test_what_two_tasks_share_is_not_filled_in_by_either(tmp_path):
    mine = fill(tmp_path / "mine")
    first = text_folder(mine)
    first.sources("train")
    shared = dict(first._loaded)
    second = text_folder(mine)
    for split in SPLITS:
        second.sources(split)
    assert second._loaded is first._loaded and first._loaded == shared, "it was whole"


def test_too_few_tasks_say_how_many_are_needed(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(lines("english")))
    with pytest.raises(UserError, match=r"holds 1 tasks that can be used, and at least 3 with 4 rows of 16 tokens"):
        text_folder(tmp_path).sources("train")


# What splits lines and cells elsewhere stands in a text here.
ODD = 'commas, "quotes", a separator\u2028and an\x0bother and number {}'


def test_tables_keep_what_stands_in_a_cell(tmp_path):
    rows = [(task, ODD.format(number)) for number in range(8) for task in "abc"]
    cells = "".join(f'{task},"{text.replace(chr(34), 2 * chr(34))}"\n' for task, text in rows)
    (tmp_path / "t.csv").write_text("who,says\n" + cells, encoding="utf-8")
    objects = (json.dumps({"who": task, "says": text}, ensure_ascii=False) for task, text in rows)
    (tmp_path / "t.jsonl").write_text("\n".join(objects), encoding="utf-8")
    expected = {task: [text for other, text in rows if other == task] for task in "abc"}
    for name in ("t.csv", "t.jsonl"):
        assert sources(text_folder(tmp_path / name, task_column="who", text_column="says")) == expected


def test_a_table_in_another_encoding_is_named_with_the_byte(tmp_path):
    (tmp_path / "t.csv").write_bytes("task,text\na,é\n".encode("latin-1"))
    with pytest.raises(UserError, match=re.escape("t.csv: is no UTF-8 at byte 12 (0xe9)")):
        text_folder(tmp_path / "t.csv").sources("train")


def test_constructing_reads_nothing(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\0")
    assert text_folder(tmp_path / "t.csv").spec.x_shape == (16,)


@pytest.mark.parametrize(
    ("field", "setting"),
    [("path", {"path": None}), ("unit", {"unit": "word"}), ("k_shot", {"k_shot": 0})],
)
def test_a_wrong_setting_is_named_at_once(tmp_path, field, setting):
    with pytest.raises(InvalidValue) as caught:
        text_folder(**{"path": tmp_path, **setting})
    assert caught.value.field == field


@pytest.mark.parametrize("path", [__file__, "nowhere"])
def test_a_path_that_holds_no_texts_is_named_when_tasks_are_drawn(path):
    with pytest.raises(
        InvalidValue, match=rf"path={path}: (must|there is no such folder or file, looked for at /.*must)"
    ):
        text_folder(path).sample(1, "train", torch.Generator().manual_seed(0))


def test_the_same_files_give_the_same_tasks(tmp_path):
    mine = fill(tmp_path / "mine")
    first, second = (text_folder(mine).sample(4, "train", torch.Generator().manual_seed(0)).hash() for _ in range(2))
    assert first == second


def test_two_unicode_forms_of_a_name_are_one_task_of_a_table(tmp_path):
    def texts(name):
        return [f"{name!a} says {number} things" for number in range(12)]

    names = ["é", "e\N{COMBINING ACUTE ACCENT}", "a", "b", "c"]
    rows = [json.dumps({"task": name, "text": text}) for name in names for text in texts(name)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = sources(text_folder(tmp_path / "t.jsonl"))
    assert sorted(found) == ["a", "b", "c", "é"] and len(found["é"]) == 2 * len(found["a"])
