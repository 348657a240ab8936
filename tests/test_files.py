"""Files: JSON that every reader accepts."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from mlframework.files import as_json, write_json
from mlframework.judging import Interval
from mlframework.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


def strict(text: str):
    """What a reader makes of JSON text that, as RFC 8259 says, knows neither NaN nor infinity."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_however_deep_it_lies(tmp_path, value):
    content = {"loss": [1.5, value], "rows": ({"interval": Interval(1.0, value, 1)}, value), "text": "NaN", "n": 2}
    wanted = {"loss": [1.5, None], "rows": [{"interval": [1.0, None, 1]}, None], "text": "NaN", "n": 2}
    assert strict(as_json(content)) == wanted
    write_json(tmp_path / "a" / "one.json", content)
    RunFolder(tmp_path).write_json(tmp_path / "other.json", content)
    assert strict((tmp_path / "a" / "one.json").read_text()) == strict((tmp_path / "other.json").read_text()) == wanted


def test_all_results_of_the_repository_are_json():
    found = sorted((ROOT / "results").rglob("*.json"))
    assert found
    for path in found:
        strict(path.read_text(encoding="utf-8"))


def test_all_json_is_written_by_one_function():
    """`json.dumps` writes NaN; what needs it for an inner value names it here."""
    allowed = {"mlframework/files.py", "mlframework/tasks/text/tokens.py"}
    sources = [path for folder in ("mlframework", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    writers = {str(path.relative_to(ROOT)) for path in sources if "json.dump" in path.read_text(encoding="utf-8")}
    assert writers == allowed


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def test_tables_of_results_say_that_a_loss_diverged_and_leave_out_a_missing_interval(script):
    results = script("results")
    assert results.cell({"mean": None, "half_width": None}, 1, 3) == "diverges"
    assert results.cell({"mean": 0.25, "half_width": None}, 100, 1) == "25.0"
    assert results.cell({"mean": 0.25, "half_width": 0.01}, 100, 1) == "25.0 ± 1.0"
    assert results.paper("omniglot_5w1s_maml", None, 100) == "98.7 ± 0.4, transductive (Finn et al. 2017, table 1)"


def test_a_diverged_seed_makes_its_cell_of_the_sinusoid_table_diverge(script):
    shots = script("sinusoid_shots")
    job = {"method": "maml", "k_shot": 5, "steps": list(range(11))}
    jobs = [{**job, "losses": [1.0] * 11}, {**job, "losses": [1.0] * 10 + [None]}]
    found = shots.cells(jobs)
    assert shots.number(found[shots.Cell("maml", 5, 5)]) == "1.00 ± 0.00"
    assert shots.number(found[shots.Cell("maml", 5, 10)]) == "diverges"


def test_a_diverged_step_of_the_text_tables_diverges_and_is_never_the_smallest(script):
    members = script("text_members")
    quality = {moment: dict.fromkeys(members.MEASURES, None) for moment in ("after", "real")}
    job = {"task": "t", "algorithm": "fomaml", "seconds": 60, "bits": {"fomaml": [3.0, None]}, "quality": quality}
    found = members.cells([job, job])
    assert found[members.Cell("t", "fomaml", "bits")].mean == 3.0
    assert members.number(found[members.Cell("t", "fomaml", 1)], 3) == "diverges"
