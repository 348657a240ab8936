"""docs/performance.md has what its script makes of the results; the script's sums, and the benchmarks' counters."""

import importlib
from pathlib import Path

import pytest
import torch
from test_docs import DOCS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]


def module(folder, name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module(name)


@pytest.fixture
def performance(monkeypatch):
    return module("scripts", "performance", monkeypatch)


@pytest.fixture
def counters(monkeypatch):
    return module("benchmarks", "counters", monkeypatch)


def test_the_page_has_what_the_script_makes_of_the_results(performance):
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    for name, text in performance.parts():
        stands = page.split(f"<!-- begin: scripts/performance.py {name} -->\n")[1].split("\n<!-- end -->")[0]
        assert stands == text, f"{name}: run scripts/performance.py"


def test_what_was_not_measured_is_named(performance):
    for make in (
        performance.outer_step,
        performance.scaling,
        performance.memory,
        performance.costs,
        performance.model,
        performance.captured,
        performance.profile,
    ):
        assert make([]).startswith("Not measured yet: `python benchmarks/")


def scaled(contender, tasks, seconds):
    return {
        "growth": "tasks",
        "network": "MLP 40-40",
        "tasks": tasks,
        "inner_steps": 1,
        "n_way": 5,
        "k_shot": 1,
        "contender": contender,
        "seconds": seconds,
    }


def test_the_worst_ratio_to_the_plain_loop_is_told(performance):
    machine = {"processor": "abacus", "threads": 1, "torch": "2"}
    runs = [
        {"machine": machine, "threads": 1, "cells": [scaled("plain loop", 1, 2.0), scaled("ours", 1, 9.0)]},
        {"machine": machine, "threads": 1, "cells": [scaled("ours", 1, 3.0)]},  # later, in the former's place
        {"machine": machine, "threads": 2, "cells": [scaled("plain loop", 4, 8.0), scaled("ours", 4, 1.0)]},
    ]
    text = performance.scaling(runs)
    assert "at most 1.50 times the plain loop's time (MLP 40-40, 1 task, 1 step)" in text
    assert "above 1.05 in 1 of 2 cells" in text
    assert "| MLP 40-40, 4 tasks, 1 step |  |  |  | 8000 | 1000 | 8.00x |  |" in text


def test_a_contender_that_was_left_out_is_named_with_the_reason(performance):
    common = {"workload": "W1-sinusoid-25x1", "first_order": False}
    cells = [
        {**common, "contender": "learn2learn", "seconds": 0.06, "mb": 3.0, "fraction": 0.002},
        {**common, "contender": "captured", "seconds": 0.001, "mb": 9.0, "fraction": 0.1},
        {**common, "contender": "higher", "left_out": "No module named 'higher'"},
    ]
    machine = {"processor": "abacus", "threads": 1, "torch": "2"}
    text = performance.outer_step([{"machine": machine, "threads": n, "cells": cells} for n in (1, 2)])
    assert "| captured | 1 | 60.00x |  | 9 | 10.0% | 1 | 60.00x |  | 9 | 10.0% |" in text
    assert "Left out: higher (No module named 'higher')." in text


def test_the_model_divides_tasks_and_pays_for_the_link(performance):
    work = performance.Work("some", tasks=10, flops=1e9, calls=100, parameters=1000)
    device = performance.Device("some", rate=1e10, fraction=0.5, call=1e-3)
    link = performance.Link(bandwidth=4000.0, latency=1e-2)
    assert performance.step_seconds(work, device, 1, link) == pytest.approx(0.1 + 10 * 0.2)
    assert performance.step_seconds(work, device, 4, link) == pytest.approx(0.1 + 3 * 0.2 + 6 * (0.25 + 0.01))


def test_the_model_is_fitted_to_what_was_measured(performance):
    small, large = {"seconds": 0.01, "calls": 1000}, {"seconds": 0.1, "calls": 2000, "gemm": 1e11}
    core = performance.core_of(small, large, {"flops": 4e9})
    work = performance.Work("large", tasks=4, flops=1e9, calls=2000, parameters=7)
    assert performance.step_seconds(work, core, 1, performance.NETWORK) == pytest.approx(large["seconds"])


@pytest.mark.parametrize("tasks", [1, 2])
def test_convolutions_of_tasks_are_counted_as_one_after_another(tasks, counters):
    x = torch.randn(3, tasks * 4, 9, 9, requires_grad=True)
    weight = torch.randn(tasks * 5, 4, 3, 3, requires_grad=True)

    def twice(x, weight, groups=1):
        y = nn.functional.conv2d(x, weight, None, 2, 1, groups=groups)
        grads = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        torch.autograd.grad(grads[1].square().sum(), (x, weight), retain_graph=True)

    with FlopCounterMode(display=False) as theirs:
        for task in range(tasks):
            twice(x[:, task * 4 : task * 4 + 4], weight[task * 5 : task * 5 + 5])
    with counters.Operations() as ours:
        twice(x, weight, tasks)
    assert ours.total == theirs.get_total_flops() > 0


def test_peak_memory_is_that_of_tensors_that_are_held_at_once(counters):
    before = torch.ones(1000)
    with counters.PeakMemory() as memory:
        views = before.view(10, 100).t()  # of what was there before
        first = before + 1
        del first
        second = before * 2
        third = second + views.reshape(-1)  # the reshape is a copy
    assert memory.peak == 3 * 4000
    assert memory.held == 2 * 4000
    assert third.shape == second.shape
