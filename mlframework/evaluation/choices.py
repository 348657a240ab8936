"""Every method's settings are chosen alike: on the same validation tasks, by the same metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlframework.episode import Params
from mlframework.errors import FailedRun
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop import SGD, Adam, InnerUpdate
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics

__all__ = ["Candidate", "Choice", "Rule", "choose", "following", "steps_by_rule", "thinned"]


class Rule(NamedTuple):
    """An update rule with its rate.

    Attributes:
        name: of the optimizer.
        lr: its rate.
    """

    name: str
    lr: float

    def __str__(self) -> str:
        return f"{self.name} {self.lr:g}"

    def update(self, params: Params) -> InnerUpdate:
        """The rule for some parameters."""
        return (Adam if self.name == "Adam" else SGD)(params, self.lr)


class Candidate(NamedTuple):
    """One setting of a method.

    Attributes:
        judge: gives each query metric of every task of a set, `[steps, tasks]`.
        steps: the training steps on the support set to which the rows of these metrics belong.
        named: the setting in words; empty where the method has only one.
        rule: the update rule; None: the method's own, or none.
    """

    judge: Callable[[TaskSet], Metrics]
    steps: Sequence[int]
    named: str = ""
    rule: Rule | None = None

    @property
    def setting(self) -> str:
        """The setting in words, as `Adam 0.01`."""
        return str(self.rule) if self.rule else self.named


class Choice(NamedTuple):
    """The setting and the number of steps that did best on validation tasks.

    Attributes:
        candidate: the setting.
        row: which of its steps.
        value: the mean of the metric there.
    """

    candidate: Candidate
    row: int
    value: float

    @property
    def steps(self) -> int:
        """Training steps on the support set."""
        return self.candidate.steps[self.row]


def choose(candidates: Iterable[Candidate], tasks: TaskSet, metric: str, *, higher_is_better: bool) -> Choice:
    """Judges every setting on validation tasks and takes the best one at its best number of steps.

    Values that are not finite are never the best; of equal ones the first wins.

    Raises:
        FailedRun: no setting has a finite value.
    """
    best: Choice | None = None
    for candidate in candidates:
        for row, value in enumerate(candidate.judge(tasks)[metric].double().mean(1).tolist()):
            better = best is None or (value > best.value if higher_is_better else value < best.value)
            if math.isfinite(value) and better:
                best = Choice(candidate, row, value)
    if best is None:
        raise FailedRun(f"no setting has a finite {metric} on the {tasks.split} tasks")
    return best


def steps_by_rule(meta_layer: MetaLayer) -> bool:
    """True if the inner loop of an algorithm follows an update rule that another rule can replace."""
    return hasattr(meta_layer, "update") and hasattr(meta_layer, "adapted_names")


@contextmanager
def following(meta_layer: MetaLayer, rule: Rule | None) -> Iterator[None]:
    """Lets an inner loop follow another update rule for a while; None: its own."""
    if rule is None:
        yield
        return
    stepping: Any = meta_layer
    own = stepping.update
    params = {name: meta_layer.base_layer.get_parameter(name).detach() for name in stepping.adapted_names}
    stepping.update = rule.update(params).to(next(iter(params.values())).device)
    try:
        yield
    finally:
        stepping.update = own


def thinned(steps: int) -> list[int]:
    """0, 1, 2, 5, 10, 20, 50, ... and the last: the numbers of steps among which one is chosen.

    >>> thinned(100), thinned(30), thinned(1)
    ([0, 1, 2, 5, 10, 20, 50, 100], [0, 1, 2, 5, 10, 20, 30], [0, 1])
    """
    marks = (digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5))
    return [0, *(mark for mark in marks if mark < steps), steps]
