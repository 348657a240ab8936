"""Files: JSON that every reader accepts."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from mlframework.evaluation.interval import Interval
from mlframework.files import as_json, write_json

ROOT = Path(__file__).parents[1]


def strict(text: str):
    """What a reader makes of JSON text that, as RFC 8259 says, knows neither NaN nor infinity."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_however_deep_it_lies(tmp_path, value):
    content = {"loss": [1.5, value], "rows": ({"interval": Interval(1.0, value, 1)}, value), "text": "NaN", "n": 2}
    wanted = {"loss": [1.5, None], "rows": [{"interval": [1.0, None, 1, None]}, None], "text": "NaN", "n": 2}
    assert strict(as_json(content)) == wanted
    write_json(tmp_path / "a" / "one.json", content)
    assert strict((tmp_path / "a" / "one.json").read_text()) == wanted


def test_all_results_of_the_repository_are_json():
    found = sorted((ROOT / "results").rglob("*.json"))
    assert found
    for path in found:
        strict(path.read_text(encoding="utf-8"))


def test_all_json_is_written_by_one_function():
    """`json.dumps` writes NaN; what needs it for an inner value names it here."""
    allowed = {
        *("mlframework/files.py", "mlframework/tasks/tables/read_table.py", "mlframework/tasks/text/tokens.py"),
        *("mlframework/runs/overrides.py", "mlframework/runs/search.py", "mlframework/runs/trusted.py"),
        "benchmarks/displays.py",
    }
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


def evaluation_of(losses: list[float | None]) -> dict:
    """An evaluation of one method on two tasks, with a loss after each number of steps."""
    metrics = {"query_loss": [{"mean": loss} for loss in losses]}
    row = {"method": "maml", "steps": list(range(len(losses))), "setting": "", "chosen": 1, "metrics": metrics}
    return {"rows": [{**row, "values": {"query_loss": [1.0, 3.0]}}]}


def test_a_diverged_step_is_left_out_of_a_curve_and_the_chosen_steps_make_the_cell(script):
    seeds = script("seeds")
    (row,) = seeds.judged_rows(evaluation_of([4.0, 2.0, None]), "query_loss", seed=0)
    assert (row.before, row.steps, row.by_step) == (4.0, 1, {0: 4.0, 1: 2.0})
    assert seeds.over_seeds([row]).mean == 2.0


def test_a_table_pairs_differences_by_task_and_counts_the_seeds_that_finished(script):
    seeds, shots = script("seeds"), script("sinusoid_shots")
    (row,) = seeds.judged_rows(evaluation_of([4.0, 2.0]), "query_loss", seed=0)
    other = row._replace(values=[0.5, 2.5])
    difference = seeds.mean_difference([row], [other], None)
    assert (difference.mean, difference.half_width) == (0.5, 0.0)
    found = shots.cell(10, [row], [other], {"seconds": [3.0]})
    assert shots.named({**found, "method": "anil"}) == "anil (1 of 3 seeds)"
