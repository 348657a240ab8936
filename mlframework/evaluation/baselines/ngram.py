"""n-grams of the support set and of all training text: the bar for learned text models."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from mlframework.episode import masked_mean
from mlframework.evaluation.choices import Candidate, Trial
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import Metrics
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text.text_tasks import TextTasks, as_text
from mlframework.text.ngram import NGramModel

__all__ = ["NGrams", "ngram_values"]


class NGrams(Baseline):
    """A Kneser-Ney model of each support set and of all training text; validation tasks say how to mix the two.

    Its longest n-grams are of `order` tokens.
    """

    def __init__(self, *, order: int) -> None:
        self.order = at_least("order", order, 1)

    def check(self, task: TaskDistribution) -> None:
        as_text(task)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        task = as_text(trial.task)
        ngrams = functools.partial(ngram_values, task, order=self.order, validation=trial.validation)
        choice = trial.choose([Candidate(ngrams, (1,))])
        yield trial.row(f"{self.order}-gram of support and training text", "none", choice)


def ngram_values(task: TextTasks, tasks: TaskSet, *, order: int, validation: TaskSet) -> Metrics:
    """The query metrics `[1, tasks]` of n-grams of all training text and each support set, tuned on `validation`."""
    rows = task.rows("train")
    train = rows.examples(torch.arange(len(rows.lengths)))
    model = NGramModel(task.spec.out_features, order=order)
    model.fit_background(*train)
    model.tune(validation)
    losses, bits = [], []
    for episode in tasks:
        query = episode.query
        losses.append(masked_mean(-model.log_probabilities(episode.support, query), query.mask))
        bits.append(task.bits_per_character(losses[-1], query.y, query.mask))
    return {"query_loss": torch.cat(losses)[None], "query_bits_per_character": torch.cat(bits)[None]}
