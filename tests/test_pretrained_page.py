"""The measured tables of docs/pretrained.md show what was measured."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("folder", "name"), [("scripts", "pretrained"), ("benchmarks", "large_support")])
def test_the_page_shows_what_was_measured(monkeypatch, folder, name):
    monkeypatch.syspath_prepend(ROOT / folder)
    page = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
    shown = page.split(f"<!-- begin: {folder}/{name}.py -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == "\n".join(importlib.import_module(name).drawn())


def test_a_step_from_kept_features_is_twenty_times_as_fast_as_through_the_network():
    rows = json.loads((ROOT / "results/pretrained.json").read_text(encoding="utf-8"))["rows"]
    assert len({row["hash"] for row in rows.values()}) == 1  # the same tasks
    timed = {name: row for name, row in rows.items() if "from features" in row}
    slow = [name for name, row in timed.items() if row["through the network"] < 20 * row["from features"]]
    assert len(timed) > 20 and sorted(slow) == ["matching_fce", "meta_networks"]


def test_two_thousand_images_are_adapted_to_in_a_tenth_of_the_memory():
    found = json.loads((ROOT / "results/benchmarks/large_support.json").read_text(encoding="utf-8"))
    assert found["images"] == 2000
    for row in found["rows"]:
        assert row["difference"] < 1e-5
        if row["work"] == "adapt":
            assert row["parts"]["bytes"] < row["whole"]["bytes"] / 10
