"""The tables of docs/ratings.md are those of the records."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mlframework.runs.overrides import job_name

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "ratings", raising=False)
    import ratings

    return ratings


def part(name):
    page = (ROOT / "docs" / "ratings.md").read_text(encoding="utf-8")
    return page.split(f"<!-- begin: {name} -->\n")[1].split("\n<!-- end -->")[0]


def test_the_tables_follow_from_the_records(script):
    records = script.read("*.json")
    assert "ridge_shared_head" in records
    drawn = f"{script.table(script.values(records))}\n\n{script.provenance(records)}"
    assert part("scripts/ratings.py methods") == drawn
    assert part("scripts/ratings.py partitions") == "\n".join(script.partition_tables())


def test_the_mean_of_a_row_is_that_of_its_users(script):
    row = {"of_user": {"query_mae": {"1": 0.5, "2": 1.0, "7": 0.9}}}
    assert script.mean_of(row, "query_mae") == pytest.approx(0.8)


def test_where_a_seed_moves_all_of_its_users_seeds_are_what_counts(script):
    def rows(values):
        """Nine users under each seed, other ones each time."""
        return {
            seed: {"of_user": {"query_mae": {f"{seed} {user}": value for user in range(9)}}}
            for seed, value in enumerate(values)
        }

    width = float(script.paired(rows([0, 1, 2, 3, 4, 5]), rows([0] * 6), "query_mae").split(" ± ")[1])
    assert width == pytest.approx(stats.t(5).ppf(0.975) * np.std(range(6), ddof=1) / 6**0.5, rel=0.2)


def write_job(folder: Path, seed: int, rate: str, validation: float, metrics) -> None:
    """What the ratings' records are made from, of one job of a sweep."""
    interval = {"mean": validation, "half_width": 0.1, "over_sources": None}
    row = {"method": "maml", "setting": "", "chosen": 0, "steps": [0], "validation": validation}
    row |= {"metrics": {name: [interval] for name in metrics}, "values": {key: [1.0, 2.0] for key in metrics}}
    content = {"status": "finished", "overrides": [f"optimizer.lr={rate}", f"seed={seed}"], "seconds": 1.0}
    content |= {"monitor": "query_mae", "validation": {"query_mae": interval}}
    content |= {"evaluation": {"rows": [row], "sources": [["ann"], ["bob"]], "task_hash": "0" * 16}}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))
    (folder / "environment.json").write_text(json.dumps({"git": {"commit": "f" * 40}, "machine": "a machine"}))


def test_a_sweep_is_read_with_numbered_folders_and_with_named_ones(script, tmp_path):
    jobs = [(seed, rate) for seed in range(4) for rate in ("0.001", "0.003", "0.01")]
    for number, (seed, rate) in enumerate(jobs):
        validation = (number * 7 % 12) / 10
        named = job_name([f"optimizer.lr={rate}", f"seed={seed}"])
        for folder in (tmp_path / "old" / str(number), tmp_path / "new" / named):
            write_job(folder, seed, rate, validation, script.METRICS)
    old, new = script.record(tmp_path / "old"), script.record(tmp_path / "new")
    assert old == new and [run["seed"] for run in old["runs"]] == [0, 1, 2, 3]
    for run in old["runs"]:
        assert run["rate"] == min(run["validation_mae_by_rate"], key=run["validation_mae_by_rate"].get)
