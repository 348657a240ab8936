"""Does meta-learning help? An algorithm beside conventional methods on the same tasks: differences, tests, costs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mlframework.evaluation.choices import Candidate, Choice, Trial
from mlframework.evaluation.interval import Interval, Sources
from mlframework.evaluation.report import MethodResult, difference

__all__ = [
    *("ClockedTrial", "Comparison", "Cost", "Crossing", "Standing"),
    *("crossing", "holm", "standings", "wilcoxon_p", "widest"),
]

#: The significance level of a verdict.
LEVEL = 0.05

#: Draws of the learning curves from which the interval of a crossing is taken.
DRAWS = 4000


class Cost(NamedTuple):
    """Seconds that a method takes."""

    training: float | None  # of the clock, for training tasks, once; None where it learns from none
    tuning: float  # of processor time, to choose its settings on validation tasks
    adapting: float  # of processor time, to adapt to one task and predict its queries


class ClockedTrial(Trial):
    """A trial that measures the processor time of each method."""

    def __init__(self, *fields: Any) -> None:
        self.tuning = 0.0  # of the last choice
        self.adapting: dict[tuple[str, str], float] = {}  # by method and batch-norm policy

    def choose(self, candidates: Iterable[Candidate]) -> Choice:
        began = time.process_time()
        choice = super().choose(candidates)
        self.tuning = time.process_time() - began
        return choice

    def row(self, method: str, batch_norm: str, choice: Choice, *, tasks: int | None = None) -> MethodResult:
        """The row; its time counts the share of steps up to the chosen one, as adapting would end there."""
        began = time.process_time()
        row = super().row(method, batch_norm, choice, tasks=tasks)
        share = max(choice.steps, 1) / max(*row.steps, 1)
        self.adapting[method, batch_norm] = (time.process_time() - began) * share / row.tasks
        return row


class Standing(NamedTuple):
    """A method of a comparison, and how it stands beside the algorithm."""

    row: MethodResult
    cost: Cost
    p_value: float | None = None  # of Wilcoxon's signed-rank test against the algorithm; None for the algorithm
    adjusted: float | None = None  # the same after Holm's correction over all methods of the comparison
    verdict: str = ""  # wins, loses or level; empty for the algorithm

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "row": self.row.to_json(), "cost": self.cost._asdict()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Standing:
        row = dict(content["row"])
        metrics = {name: [interval_of(each) for each in steps] for name, steps in row["metrics"].items()}
        minus = row["difference"] and {name: interval_of(each) for name, each in row["difference"].items()}
        row |= {"steps": tuple(row["steps"]), "metrics": metrics, "difference": minus}
        return cls(**{**content, "row": MethodResult(**row), "cost": Cost(**content["cost"])})


class Comparison(NamedTuple):
    """The methods on one frozen set of tasks, the algorithm first."""

    task_hash: str
    split: str
    tasks: int
    seed: int  # of the draws
    validation_tasks: int
    metric: str  # by which choices are made and methods compared
    higher_is_better: bool
    sources: Sources | None
    standings: list[Standing]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "standings": [each.to_json() for each in self.standings]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        return cls(**{**content, "standings": [Standing.from_json(each) for each in content["standings"]]})


def interval_of(content: Mapping[str, Any]) -> Interval:
    """An interval that JSON keeps, where a number that is not finite is null."""
    missing = {name: math.nan for name in ("mean", "half_width") if content[name] is None}
    return Interval(**{**content, **missing})


def standings(
    rows: Sequence[MethodResult],
    costs: Sequence[Cost],
    *,
    algorithm_rows: int,
    metric: str,
    higher_is_better: bool,
    sources: Sources | None,
) -> list[Standing]:
    """Each row beside the first, tested; the first `algorithm_rows` are the algorithm's own, under several policies.

    A method wins or loses where two things agree: the interval of its difference leaves out zero, and Wilcoxon's test
    after Holm's correction is below 0.05.
    """
    first, pairs = rows[0], list(zip(rows, costs, strict=True))
    others = [(row, cost) for row, cost in pairs[algorithm_rows:] if metric in row.values]
    p_values = [wilcoxon_p(row.values[metric], first.values[metric], sources) for row, _ in others]
    found = [Standing(row, cost) for row, cost in pairs[:algorithm_rows]]
    for (row, cost), p, adjusted in zip(others, p_values, holm(p_values), strict=True):
        paired = difference(row, first, sources)
        verdict = verdict_of(paired[metric], adjusted, higher_is_better)
        found.append(Standing(row._replace(difference=paired), cost, p, adjusted, verdict))
    return found


def verdict_of(found: Interval, p_value: float, higher_is_better: bool) -> str:
    """`wins`, `loses`, `level` or `undecided` for a difference of a method minus the algorithm.

    The interval is of the mean difference, the test of the median: where one alone tells them apart, it is undecided.
    """
    told_apart = math.isfinite(found.mean) and abs(found.mean) > widest(found)
    if told_apart is not (p_value < LEVEL):
        return "undecided"
    if not told_apart:
        return "level"
    return "wins" if (found.mean > 0) is higher_is_better else "loses"


def widest(found: Interval) -> float:
    """Half the interval over sources, where there is one: that over tasks would be too narrow."""
    return found.half_width if found.over_sources is None else found.over_sources


def wilcoxon_p(ours: Sequence[float], theirs: Sequence[float], sources: Sources | None) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test of paired values, over the tasks that both have.

    Tasks of one source are not independent: where each task has exactly one source, the means of sources are tested.

    Reference: Wilcoxon, Individual comparisons by ranking methods, 1945, Biometrics Bulletin 1.

    >>> round(wilcoxon_p([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.5, 1.0, 1.5, 2.0], None), 4)
    0.0625
    """
    from scipy.stats import wilcoxon  # here: it takes a second to import

    differences = [one - other for one, other in zip(ours, theirs, strict=False)]
    if sources is not None and all(len(task) == 1 for task in sources):
        by_source: dict[str, list[float]] = {}
        for (source,), value in zip(sources, differences, strict=False):
            by_source.setdefault(source, []).append(value)
        differences = [sum(values) / len(values) for values in by_source.values()]
    differences = [value for value in differences if math.isfinite(value)]
    if not any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down procedure, in the same order.

    Reference: Holm, A simple sequentially rejective multiple test procedure, 1979, Scand. J. of Statistics 6.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


class Crossing(NamedTuple):
    """The number of shots from which on a method is at least as good as the algorithm, with its 95 % interval.

    A number beyond the last of the curve is None. `shots` is that of the means; `low` and `high` those of curves drawn
    within the intervals.
    """

    shots: float | None
    low: float | None
    high: float | None

    def described(self, first: float, last: float) -> str:
        """In words, for a curve from `first` to `last` shots.

        >>> Crossing(12.2, 9.0, None).described(1, 50), Crossing(None, None, None).described(1, 50)
        ('catches up at 12 shots (95 %: above 9)', 'does not catch up within 50 shots')
        >>> Crossing(1, 1, 3.4).described(1, 50), Crossing(None, 31.0, None).described(1, 50)
        ('is as good or better from 1 on (95 %: up to 3.4)', 'does not catch up within 50 shots (95 %: above 31)')
        >>> Crossing(None, 1.0, None).described(1, 50)
        'does not catch up within 50 shots (95 %: from 1 on, or never)'
        """
        if self.low is not None and self.low <= first and self.high is None:
            bounds = [f"from {first:g} on, or never"]
        else:
            bounds = self.bounds(first)
        interval = f" (95 %: {', '.join(bounds)})" if bounds else ""
        if self.shots is None:
            return f"does not catch up within {last:g} shots{interval}"
        if self.shots <= first:
            return f"is as good or better from {first:g} on{interval}"
        return f"catches up at {self.shots:.2g} shots{interval}"

    def bounds(self, first: float) -> list[str]:
        """The ends of the interval that lie on the curve."""
        bounds = [f"above {self.low:.2g}"] if self.low is not None and self.low > first else []
        return bounds + ([f"up to {self.high:.2g}"] if self.high is not None and self.high > first else [])


def crossing(shots: Sequence[int], differences: Sequence[Interval], *, higher_is_better: bool) -> Crossing:
    """Where a method's learning curve catches up with the algorithm's, and stays.

    Between two numbers of shots the difference is taken to be linear in the logarithm of their number. The interval is
    a parametric bootstrap: each point of the curve moves by its own standard error, for the tasks of two numbers of
    shots are different tasks.

    Args:
        shots: in increasing order.
        differences: the method minus the algorithm at each of these.
    """
    sign = 1 if higher_is_better else -1
    lead = torch.tensor([sign * each.mean for each in differences], dtype=torch.float64)
    errors = torch.tensor([widest(each) / 1.96 for each in differences], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(DRAWS, len(shots), generator=generator, dtype=torch.float64)
    drawn = sorted(level_from(shots, path) for path in (lead + noise * errors.nan_to_num(0)).tolist())
    points = level_from(shots, lead.tolist()), drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1]
    return Crossing(*(point if math.isfinite(point) else None for point in points))


def level_from(shots: Sequence[int], lead: Sequence[float]) -> float:
    """The shots from which on a lead is not negative; infinity where it is at the last.

    >>> level_from([1, 4, 16], [-1.0, -1.0, 1.0]), level_from([1, 4], [0.5, 0.0]), level_from([1, 4], [2.0, -1.0])
    (8.0, 1.0, inf)
    """
    behind = [index for index, value in enumerate(lead) if not value >= 0]
    if not behind:
        return float(shots[0])
    before, after = behind[-1], behind[-1] + 1
    if after == len(shots):
        return math.inf
    share = lead[before] / (lead[before] - lead[after])
    low, high = math.log(shots[before]), math.log(shots[after])
    return round(math.exp(low + (high - low) * share), 6)


def differences_at(curve: Mapping[int, Comparison], method: str) -> dict[int, Interval]:
    """A method's difference from the algorithm at each number of shots at which it was judged."""
    found = {}
    for shots, comparison in sorted(curve.items()):
        for standing in comparison.standings:
            if standing.row.method == method and standing.row.difference is not None:
                found[shots] = standing.row.difference[comparison.metric]
    return found
