"""The measured tables of docs/pretrained.md show what was measured."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_shows_the_memory_that_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
    shown = page.split("<!-- begin: benchmarks/large_support.py -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == "\n".join(importlib.import_module("large_support").drawn())


def test_two_thousand_images_are_adapted_to_in_a_tenth_of_the_memory():
    found = json.loads((ROOT / "results/benchmarks/large_support.json").read_text(encoding="utf-8"))
    assert found["images"] == 2000
    for row in found["rows"]:
        assert row["difference"] < 1e-5
        if row["work"] == "adapt" and row["algorithm"] != "ridge":  # whose own matrices are of all examples
            assert row["parts"]["bytes"] < row["whole"]["bytes"] / 10
