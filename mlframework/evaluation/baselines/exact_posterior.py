"""The exact posterior of tasks that come from a Gaussian process: no method does better on average."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mlframework.episode import Episode, masked_mean
from mlframework.errors import UserError
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet
from mlframework.meta_layers.meta_layer import Metrics
from mlframework.meta_layers.predictive import normal_nll
from mlframework.tasks.prior.table_prior import HasPosterior
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ExactPosterior"]


class ExactPosterior(Baseline):
    """The task distribution's own posterior: the squared error of its mean, and its negative log-likelihood.

    The report's difference between the first row and this one is the gap of the trained network.
    """

    kinds = ("regression",)

    def check(self, task: TaskDistribution) -> None:
        super().check(task)
        if not isinstance(task, HasPosterior):
            raise UserError(f"{type(task).__name__} has no posterior(support, x): use task=prior, or leave it out")
        episode = task.sample(1, "validation", torch.Generator().manual_seed(0))
        task.posterior(episode.support, episode.query.x)  # says why it is not known

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        def judge(tasks: TaskSet) -> Metrics:
            found = [scores(trial.task, episode) for episode in tasks]
            return {name: torch.cat([part[name] for part in found])[None] for name in found[0]}

        choice = trial.choose([Candidate(judge, (0,))])
        yield trial.row("exact posterior", "none", choice)


def scores(task: TaskDistribution, episode: Episode) -> Metrics:
    """The query loss and the negative log-likelihood of each task `[tasks]`."""
    assert isinstance(task, HasPosterior)
    query = episode.query
    mean, variance = task.posterior(episode.support, query.x)
    mask = query.mask if task.spec.ragged else None
    values = task.scores(mean.to(query.y.dtype), query.y, query.mask)
    nll = masked_mean(normal_nll(mean, variance.unsqueeze(-1), query.y.double()), mask)
    return {**{f"query_{name}": value for name, value in values.items()}, "query_nll": nll.to(query.y.dtype)}
