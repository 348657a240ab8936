"""The board: every record is whole, its tasks are drawn again with the same hash, and its page is up to date."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
from pathlib import Path

import pytest

from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.task_set import TaskSet
from mlframework.files import write_json
from mlframework.runs.board import BoardRecord, add_to_board, read_board, task_set_of
from mlframework.tasks import Sinusoid

ROOT = Path(__file__).parents[1]
BOARD = ROOT / "results" / "board"

RECORD = {
    "task": "sinusoid",
    "task_config": {"_target_": "mlframework.tasks.Sinusoid", "k_shot": 10, "k_query": 10},
    "split": "test",
    "tasks": 20,
    "task_seed": 0,
    "hash": TaskSet(Sinusoid(k_shot=10, k_query=10), "test", tasks=20, seed=0).hash(),
    "method": "maml",
    "setting": "",
    "metric": "query_loss",
    "mean": 0.5,
    "half_width": 0.1,
    "over_sources": None,
    "seeds": [0],
    "command": "mlframework-compare",
    "trained": "mlframework-train",
    "is_algorithm": True,
    "commit": "0" * 40,
    "machine": "a processor",
}


def written(folder: Path, **changes) -> Path:
    path = folder / "record.json"
    write_json(path, {**RECORD, **changes})
    return path


def records():
    """All; the slow ones draw images or texts."""
    for path in sorted(BOARD.glob("*.json")):
        yield pytest.param(path, id=path.stem, marks=() if path.stem.startswith("sinusoid") else pytest.mark.slow)


@pytest.mark.parametrize("path", list(records()))
def test_a_record_of_the_board_is_whole_and_its_tasks_have_its_hash(path):
    record = BoardRecord.read(path)
    assert path.name == record.file_name
    task_set = json.dumps([record.task_config, record.split, record.tasks, record.task_seed], sort_keys=True)
    assert hash_of(task_set, path) == record.hash


@functools.cache
def hashes() -> dict[str, str]:
    """Those that were computed: methods share sets of tasks."""
    return {}


def hash_of(task_set: str, path: Path) -> str:
    if task_set not in hashes():
        try:
            hashes()[task_set] = task_set_of(BoardRecord.read(path)).hash()
        except (InvalidValue, UserError) as error:
            pytest.skip(f"its data are not there: {error}")
    return hashes()[task_set]


def test_the_page_is_drawn_from_the_records():
    page = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
    drawn = runpy.run_path(str(ROOT / "scripts" / "board.py"))["board_tables"](list(read_board(BOARD).values()))
    assert drawn in page, "run python scripts/board.py"


def test_a_whole_record_is_read(tmp_path):
    record = BoardRecord.read(written(tmp_path))
    assert dataclasses.asdict(record) == RECORD
    assert task_set_of(record).hash() == record.hash


def test_a_hash_of_other_tasks_is_found(tmp_path):
    record = BoardRecord.read(written(tmp_path, tasks=21))
    assert task_set_of(record).hash() != record.hash


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hash": "12"}, "hash='12': must be 16 hexadecimal digits"),
        ({"commit": "main"}, "commit='main': must be 40 hexadecimal digits"),
        ({"split": "tests"}, "split='tests': must be one of train, validation, test"),
        ({"tasks": 0}, "tasks=0: must be a whole number"),
        ({"task_seed": "0"}, "task_seed='0': must be a whole number"),
        ({"mean": None}, "mean=None: must be a number"),
        ({"half_width": -1.0}, "half_width=-1.0: must be a number"),
        ({"over_sources": "wide"}, "over_sources='wide': must be a number"),
        ({"seeds": []}, "seeds=[]: must be a list of the training seeds"),
        ({"machine": ""}, "machine='': must be text"),
        ({"task_config": {}}, "task_config={}: must be the config of a task, with its _target_"),
        ({"methd": "maml"}, "methd is no field (did you mean method?); there are task, "),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_a_fault_is_named_with_its_file(tmp_path, changes, line):
    with pytest.raises(UserError) as error:
        BoardRecord.read(written(tmp_path, **changes))
    assert str(error.value).startswith(f"{tmp_path / 'record.json'}: {line}")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BoardRecord)])
def test_a_missing_field_is_named(tmp_path, name):
    path = tmp_path / "record.json"
    write_json(path, {key: value for key, value in RECORD.items() if key != name})
    with pytest.raises(UserError, match=f"{name} is missing"):
        BoardRecord.read(path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record.json: damaged \("):
        BoardRecord.read(tmp_path / "record.json")


def comparison(mean: float = 0.5) -> dict:
    """The part of a `comparison.json` that the board reads."""
    interval = {"mean": mean, "half_width": 0.1, "values": 20, "over_sources": None}

    def standing(method: str, tasks: int) -> dict:
        row = {"method": method, "batch_norm": "none", "tasks": tasks, "steps": [0, 5], "chosen": 5, "setting": ""}
        return {"row": {**row, "metrics": {"query_loss": [{**interval, "mean": 9.0}, interval]}}}

    own = {"split": "test", "tasks": 20, "seed": 0, "task_hash": RECORD["hash"], "metric": "query_loss"}
    shared = {name: RECORD[name] for name in ("task", "task_config", "command", "trained", "commit", "machine")}
    return {**shared, "seed": 3, "own": {**own, "standings": [standing("maml", 20), standing("from scratch", 8)]}}


def test_each_method_of_a_comparison_becomes_a_record_with_the_hash_of_its_own_tasks(tmp_path):
    paths = add_to_board(comparison(), tmp_path / "board")
    found = read_board(tmp_path / "board")
    assert set(found) == set(paths) and [path.name for path in paths] == [found[path].file_name for path in paths]
    maml, scratch = (found[path] for path in paths)
    assert (maml.mean, maml.seeds, maml.tasks) == (0.5, [3], 20)
    assert scratch.tasks == 8
    for record in (maml, scratch):
        assert task_set_of(record).hash() == record.hash


def test_a_result_of_the_same_method_tasks_and_seeds_replaces_the_older_one(tmp_path):
    add_to_board(comparison(), tmp_path)
    add_to_board(comparison(mean=0.25), tmp_path)
    assert [record.mean for record in read_board(tmp_path).values()] == [0.25, 0.25]
    assert not list(tmp_path.glob("*.part"))


def test_results_of_no_commit_are_refused(tmp_path):
    with pytest.raises(UserError, match="the board takes results of a commit"):
        add_to_board({**comparison(), "commit": None}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_algorithm_trained_otherwise_has_a_record_of_its_own():
    names = [BoardRecord(**{**RECORD, "trained": trained}).file_name for trained in ("one", "other", "one")]
    assert names[0] == names[2] != names[1]


def test_a_name_of_a_file_is_safe(tmp_path):
    record = BoardRecord(**{**RECORD, "method": "../../5-gram of support & text (Ω)", "is_algorithm": False})
    assert record.file_name == f"sinusoid_5_gram_of_support_text_{RECORD['hash'][:8]}_0.json"
    assert json.loads(written(tmp_path).read_text())["method"] == "maml"
