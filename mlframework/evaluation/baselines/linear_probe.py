"""A linear model of the features of a network that was trained conventionally on the training tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlframework.episode import Kind
from mlframework.evaluation.baselines.fine_tuning import fine_tuned
from mlframework.evaluation.baselines.pretraining import AfterPretraining, Pretraining
from mlframework.evaluation.baselines.scikit_learn import candidates, grid
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.report import MethodResult
from mlframework.inner_loop.inner_update import at_least

__all__ = ["LinearProbe"]


class LinearProbe(AfterPretraining):
    """Logistic or ridge regression on frozen features; of sequences, gradient steps of the head alone.

    Validation tasks choose the network and the penalty, or the rule, its rate and the number of steps.

    Args:
        tasks: the number of test tasks on which it is judged, the first of the set; None: all.
        steps: gradient steps for sequences, at most.
        pretraining: how the network was trained.
    """

    def __init__(self, *, tasks: int | None, steps: int, pretraining: Pretraining) -> None:
        super().__init__(pretraining)
        self.tasks = tasks if tasks is None else at_least("tasks", tasks, 1)
        self.steps = at_least("steps", steps, 1)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        choice = trial.choose(self.settings(trial))
        yield trial.row("linear probe", trial.shown(trial.meta_layer.batch_norm), choice, tasks=self.tasks)

    def settings(self, trial: Trial) -> Iterator[Candidate]:
        kind, policy = trial.task.spec.kind, trial.meta_layer.batch_norm
        for network in self.pretraining.networks(trial):
            if kind == "sequence":
                yield from (fine_tuned(network, rule, trial, steps=self.steps, adapts="^head") for rule in trial.rules)
                continue
            for found in candidates(grid(linear_model(kind)), network.base_layer, trial, policy):
                yield found._replace(named=f"{found.named}, {network.named}")


def linear_model(kind: Kind) -> Any:
    """Logistic regression for a classification, ridge regression for a regression."""
    from sklearn.linear_model import LogisticRegression, Ridge

    return LogisticRegression(max_iter=1000) if kind == "classification" else Ridge()
