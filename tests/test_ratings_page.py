"""The tables of docs/ratings.md are those of the records."""

import sys
from pathlib import Path

import pytest

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


def test_the_mean_of_a_record_is_that_of_its_users(script):
    """Each method's MAE is near the mean over its users, who are drawn about equally often."""
    for record in script.read("*.json").values():
        for run in record["runs"]:
            for row in run["rows"]:
                users = row["mae_of_user"].values()
                assert sum(users) / len(users) == pytest.approx(row["query_mae"], abs=0.05)
