"""Comparisons: paired tests against scipy and hand-computed cases, crossings of learning curves, verdicts, costs."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

from mlframework.evaluation.choices import Candidate, Choice
from mlframework.evaluation.comparison import (
    ClockedTrial,
    Comparison,
    Cost,
    Crossing,
    Standing,
    crossing,
    holm,
    level_from,
    standings,
    wilcoxon_p,
)
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet
from mlframework.files import as_json
from mlframework.tasks import Sinusoid

FREE = Cost(None, 0.0, 0.0)


def row(method: str, values) -> MethodResult:
    """A method with these values of the loss, one for each task."""
    found = Interval.of(torch.tensor(values))
    return MethodResult(method, "none", len(values), (0,), {"query_loss": [found]}, "", 0, 0.0, {"query_loss": values})


def judged(*rows: MethodResult, higher_is_better: bool = False, sources=None) -> list[Standing]:
    more = {"metric": "query_loss", "higher_is_better": higher_is_better, "sources": sources}
    return standings(rows, [FREE] * len(rows), algorithm_rows=1, **more)


def normal(count: int, mean: float, seed: int = 0) -> list[float]:
    return (mean + torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_wilcoxon_is_scipy_s_over_tasks():
    ours, theirs = normal(30, 0.3), normal(30, 0.0, seed=1)
    expected = stats.wilcoxon(np.array(ours) - np.array(theirs)).pvalue
    assert wilcoxon_p(ours, theirs, None) == pytest.approx(expected)
    shorter = stats.wilcoxon(np.array(ours[:9]) - np.array(theirs[:9])).pvalue
    assert wilcoxon_p(ours[:9], theirs, None) == pytest.approx(shorter), "a method may be judged on the first tasks"


def test_wilcoxon_tests_the_means_of_sources_where_each_task_has_one():
    ours, theirs = normal(60, 0.3), normal(60, 0.0, seed=1)
    sources = [(f"language {task % 12}",) for task in range(60)]
    means = (np.array(ours) - np.array(theirs)).reshape(5, 12).mean(0)
    assert wilcoxon_p(ours, theirs, sources) == pytest.approx(stats.wilcoxon(means).pvalue)
    several = [(f"character {task % 7}", f"character {task % 5}") for task in range(60)]
    assert wilcoxon_p(ours, theirs, several) == wilcoxon_p(ours, theirs, None)


def test_equal_values_are_not_told_apart():
    assert wilcoxon_p([1.0, 2.0], [1.0, 2.0], None) == 1.0


def test_holm_s_correction_by_hand():
    """Three times the smallest, twice the middle one, the largest; never below an earlier one, never above 1."""
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_share_of_false_verdicts_below_the_level():
    """Six methods that are as good as the algorithm: in at most 5 % of comparisons any of them is told apart."""
    generator, false = np.random.default_rng(0), 0
    for _ in range(300):
        p_values = [stats.wilcoxon(generator.normal(size=25)).pvalue for _ in range(6)]
        false += min(holm(p_values)) < 0.05
    assert false / 300 < 0.08


def test_a_method_wins_or_loses_by_the_direction_of_the_metric():
    ours, better, worse = normal(50, 0.0), normal(50, -2.0, seed=1), normal(50, 2.0, seed=2)
    _, first, second = judged(row("maml", ours), row("knn", better), row("svm", worse))
    assert (first.verdict, second.verdict) == ("wins", "loses")
    _, first, second = judged(row("maml", ours), row("knn", better), row("svm", worse), higher_is_better=True)
    assert (first.verdict, second.verdict) == ("loses", "wins")


def test_a_difference_that_neither_sees_is_level_and_one_that_one_sees_is_undecided():
    ours = normal(50, 0.0)
    assert judged(row("maml", ours), row("knn", normal(50, 0.05, seed=1)))[1].verdict == "level"
    # One outlier: the test sees a difference, the interval of the mean does not.
    outlier = [value - 0.1 for value in ours[:-1]] + [ours[-1] + 300.0]
    found = judged(row("maml", ours), row("knn", outlier))[1]
    assert found.adjusted < 0.05 and found.verdict == "undecided"


def test_few_sources_make_a_verdict_harder():
    """Forty tasks of four sources, one of which disagrees: only the interval over sources holds zero."""
    ours = [0.0] * 40
    theirs = [1.0 if task % 4 else -0.7 for task in range(40)]
    sources = [(str(task % 4),) for task in range(40)]
    assert judged(row("maml", ours), row("knn", theirs))[1].verdict == "loses"
    assert judged(row("maml", ours), row("knn", theirs), sources=sources)[1].verdict == "level"


def test_differences_are_paired_and_on_the_tasks_that_both_have():
    ours, theirs = normal(50, 0.0), normal(20, 1.0, seed=1)
    found = judged(row("maml", ours), row("knn", theirs))[1].row.difference["query_loss"]
    assert found.values == 20
    assert found.mean == pytest.approx(np.mean(np.array(theirs) - np.array(ours[:20])), abs=1e-6)


def test_the_algorithm_s_own_rows_are_not_its_contenders():
    ours = normal(50, 0.0)
    rows = [row("maml", ours), row("maml", normal(50, 5.0)), row("knn", normal(50, 2.0, seed=2))]
    more = {"metric": "query_loss", "higher_is_better": False, "sources": None}
    found = standings(rows, [FREE] * 3, algorithm_rows=2, **more)
    assert [each.verdict for each in found] == ["", "", "loses"]
    assert found[2].adjusted == found[2].p_value, "only one method is tested"


def test_a_method_without_the_metric_is_left_out():
    other = row("ngram", [1.0, 2.0])._replace(values={"query_bits": [1.0, 2.0]}, metrics={})
    assert [each.row.method for each in judged(row("maml", [1.0, 2.0]), other)] == ["maml"]


SHOTS = [1, 2, 5, 10, 20, 50]


def points(lead, half_width: float = 0.0) -> list[Interval]:
    return [Interval(value, half_width, 100) for value in lead]


def test_a_crossing_lies_where_a_line_in_the_logarithm_crosses_zero():
    lead = [math.log(k / 8) for k in SHOTS]
    found = crossing(SHOTS, points(lead), higher_is_better=True)
    assert found == pytest.approx((8, 8, 8))
    assert crossing(SHOTS, points([-value for value in lead]), higher_is_better=False) == found


def test_a_curve_that_never_or_always_leads():
    assert crossing(SHOTS, points([-1.0] * 6), higher_is_better=True) == Crossing(None, None, None)
    assert crossing(SHOTS, points([1.0] * 6), higher_is_better=True) == Crossing(1, 1, 1)


def test_a_lead_that_is_lost_again_is_no_catching_up():
    assert level_from([1, 2, 4], [1.0, -1.0, -1.0]) == math.inf
    assert level_from([1, 4, 16], [1.0, -1.0, 1.0]) == pytest.approx(8)
    assert level_from([1, 2], [1.0, math.nan]) == math.inf


def test_the_interval_of_a_crossing_covers_the_truth():
    """Curves with noise of a known size around a line that crosses at 8 shots."""
    generator, covered = torch.Generator().manual_seed(0), 0
    truth = torch.tensor([math.log(k / 8) for k in SHOTS])
    for _ in range(100):
        lead = truth + 0.3 * torch.randn(6, generator=generator)
        _, low, high = crossing(SHOTS, points(lead.tolist(), 1.96 * 0.3), higher_is_better=True)
        covered += (low or math.inf) <= 8 <= (high or math.inf)
    assert 88 <= covered <= 100


def trial() -> ClockedTrial:
    tasks = TaskSet(Sinusoid(), "test", tasks=4, seed=0)
    return ClockedTrial(None, None, tasks, None, tasks, [], "query_loss", torch.device("cpu"))


def burning(seconds: float, steps) -> Candidate:
    """A method that keeps the processor busy."""

    def judge(tasks):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return {"query_loss": torch.arange(len(steps) * tasks.tasks).view(len(steps), -1)}

    return Candidate(judge, steps)


def test_costs_are_time_of_the_processor_per_task_up_to_the_chosen_step():
    clocked = trial()
    choice = clocked.choose([burning(0.05, (0, 5, 10)), burning(0.1, (0, 5, 10))])
    assert 0.14 < clocked.tuning < 1
    clocked.row("whole", "none", Choice(burning(0.2, (1,)), 0, 0.0))
    clocked.row("half", "none", Choice(burning(0.2, (0, 5, 10)), 1, 0.0))
    assert clocked.adapting["whole", "none"] == pytest.approx(0.05, rel=0.5)
    assert clocked.adapting["half", "none"] == pytest.approx(0.025, rel=0.5)
    assert choice.steps == 0


def test_a_comparison_is_read_as_it_was_written():
    found = judged(row("maml", [1.0, 2.0, 4.0]), row("knn", [2.0, 2.5, 3.0]))
    whole = Comparison("0" * 16, "test", 3, 0, 5, "query_loss", False, None, found)
    content = json.loads(as_json(whole.to_json()))
    assert Comparison.from_json(content).to_json() == whole.to_json()
