"""Numbers in tables and progress lines: no digits lost, none that mean nothing, and no column emptied."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from mlframework.evaluation.interval import Interval
from mlframework.evaluation.number_format import shown, shown_interval
from mlframework.evaluation.report import MethodResult, Report
from mlframework.runs.evaluated import Evaluated, combinations_table
from mlframework.runs.sweep_table import JobRow, sweep_table
from mlframework.runs.tables import print_table, show_report


def numbers(seed: int) -> list[float]:
    """Of every size that a float has, half of them negative."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-300, 300, (200,), generator=generator).double()
    sizes = torch.rand(200, generator=generator, dtype=torch.float64) * 9 + 1
    everyday = 10 ** (torch.rand(200, generator=generator, dtype=torch.float64) * 12 - 6)
    found = torch.cat([sizes * 10**powers, everyday]) * torch.tensor([1, -1]).repeat(200)
    return found.tolist()


def test_a_number_keeps_four_digits_whatever_its_size():
    for value in numbers(0):
        assert float(shown(value)) == pytest.approx(value, rel=5.1e-4)
        assert len(shown(value)) <= 11


def read(text: str) -> tuple[float, float]:
    """The two numbers of an interval that is written down."""
    pair, _, power = text.removeprefix("(").partition(")e")
    mean, half_width = pair.split(" ± ")
    return float(f"{mean}e{power or 0}"), float(f"{half_width}e{power or 0}")


def test_an_interval_is_written_to_the_second_digit_of_its_half_width():
    for mean, share in zip(numbers(1), torch.logspace(-4, 1, 400, dtype=torch.float64).tolist(), strict=True):
        half_width = abs(mean) * share
        found_mean, found_width = read(shown_interval(mean, half_width))
        assert found_width == pytest.approx(half_width, rel=0.051)
        assert found_mean == pytest.approx(mean, abs=max(0.051 * half_width, 6e-4 * abs(mean) if share < 1e-3 else 0))
        assert len(shown_interval(mean, half_width)) <= 26


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.25, float("nan"), "0.2500"),
        (0.25, None, "0.2500"),
        (float("nan"), float("nan"), "nan"),
        (float("inf"), 1.0, "inf"),
        (1.0, 0.0, "1.000 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (0.0, 0.012, "0.000 ± 0.012"),
        (5.2, 12.3, "5 ± 12"),
        (9.9996, 0.0999, "10.00 ± 0.10"),
        (0.00031, 0.00002, "0.000310 ± 0.000020"),
    ],
)
def test_edges_of_intervals(mean, half_width, text):
    assert shown_interval(mean, half_width) == text


def printed(width: int, monkeypatch, show, *arguments) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    with redirect_stdout(out):
        show(*arguments)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_diverged_job_empties_no_column_of_the_sweeps_table(monkeypatch, width):
    keys = ("algorithm", "task", "optimizer.lr", "algorithm.inner_steps", "base_layer.hidden")
    rows = [
        JobRow("0", "finished", dict.fromkeys(keys, "first"), "query_loss", 3.6e24, 1.2e24, 2.0, 0.5, 1.0),
        JobRow("1", "finished", dict.fromkeys(keys, "second"), "query_loss", 0.00031, 0.00002, 7.0, 0.5, 123456.0),
    ]
    found = printed(width, monkeypatch, print_table, sweep_table(Path("sweep"), rows))
    first, second = (next(line for line in found.splitlines() if f" {word} " in line) for word in ("first", "second"))
    assert re.findall(r"[^│\s][^│]*[^│\s]|[^│\s]", first) == [
        *("0", *["first"] * 5),
        *("query loss", "(3.6 ± 1.2)e+24", "2.00 ± 0.50", "1.000", "finished"),
    ]
    assert "0.000310 ± 0.000020" in second and "123456" in second


@pytest.mark.parametrize("width", [20, 80])
def test_small_losses_and_diverged_ones_stand_in_an_evaluations_table(monkeypatch, width):
    steps = {"query_loss": [Interval(3.6e24, 1.2e24, 9), Interval(0.00031, 0.00002, 9)]}
    row = MethodResult("maml", "none", 9, (0, 5), steps, setting="", chosen=5, validation=0.0, values={})
    report = Report("0" * 16, "test", 9, 0, 9, "query_loss", None, [row])
    found = printed(width, monkeypatch, show_report, report, "query_loss")
    assert "(3.6 ± 1.2)e+24" in found and "0.000310 ± 0.000020 (5)" in found and "maml" in found


def test_brackets_and_colons_of_settings_are_no_markup_in_any_table(monkeypatch):
    """Rich reads [red] as a colour and :x: as a picture."""
    shared = {"evaluation/baseline": "[scikit_learn]", "run": "[red]a[/]:x:"}
    rows = [JobRow(str(i), "finished", {**shared, "task.sizes": f"[bold{i}]"}, "query_loss") for i in range(2)]
    found = printed(200, monkeypatch, print_table, sweep_table(Path("[dim]"), rows))
    for text in ("[dim] evaluation/baseline=[scikit_learn] run=[red]a[/]:x:", "[bold0]", "[bold1]"):
        assert text in found
    steps = {"query_loss": [Interval(1.0, 0.1, 9)]}
    row = MethodResult("ours[a]", "none", 9, (0,), steps, setting="c=[x]", chosen=0, validation=0.0, values={})
    report = Report("0" * 16, "test", 9, 0, 9, "query_loss", None, [row])
    assert "ours[a], c=[x]" in printed(200, monkeypatch, show_report, report, "query_loss")
    found = printed(
        200, monkeypatch, print_table, combinations_table([Evaluated(["task.a=[b]"], report, Path())], "query_loss")
    )
    assert "[b]" in found and "ours[a]" in found


@pytest.mark.parametrize("width", [40, 80, 100])
def test_no_word_is_broken_and_no_job_cut_off(monkeypatch, width):
    rows = [
        JobRow(
            f"{i:08x}", "finished", {"algorithm": each, "l": f"2 3 4 5 6 7 8 {i}"}, "query_loss", 0.5, 0.01, 0.5, 0.02
        )
        for i, each in enumerate(("anil", "maml"))
    ]
    found = printed(width, monkeypatch, print_table, sweep_table(Path("sweep"), rows))
    for word in (" algorithm ", " validation ", " 00000000 ", " 00000001 "):
        assert word in found
