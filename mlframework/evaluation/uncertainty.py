"""The quality of predictive distributions: likelihood, calibration, and the recognition of queries from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split
from mlframework.errors import part_of
from mlframework.evaluation import calibration
from mlframework.evaluation.calibration import Answers, predicted_queries
from mlframework.evaluation.interval import Interval, Sources
from mlframework.evaluation.part import Measure
from mlframework.evaluation.predictors.predictor import ConstantVariance, DerivedPredictor, with_variance
from mlframework.evaluation.report import Measured
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Uncertainty"]


class Uncertainty(Measure):
    """Judges predictive distributions on frozen tasks: the algorithm's own, and those of other predictors made of it.

    A classification and a sequence have `nll`, `ece`, `brier` and `accuracy`; a regression has `nll`,
    `interval_error`, the coverage of 90 % intervals and `mse`. `mlframework.evaluation.calibration` defines them. A
    regression's algorithm without a variance gets a constant one, fitted on validation tasks. Logarithms are natural.

    `auroc_other_task` asks whether a query from another task is told from the task's own queries: 0.5 is chance, 1 is
    best. The score is the entropy of the classes' probabilities. In a regression it is minus the log density of the
    target: inputs alone do not tell tasks apart. A task is left out if it has a source in common with the other one.

    Args:
        tasks: judged; the query set of the task that follows is the one from elsewhere.
        seed: of their draws.
        validation_tasks: on which all settings are chosen; the same for every method.
        bins: of confidence.
        adaptive: bins of equally many queries; else of equal width.
        predictor: made of the algorithm, by name.
    """

    def __init__(
        self,
        *,
        tasks: int = 600,
        seed: int = 0,
        validation_tasks: int = 100,
        bins: int = 15,
        adaptive: bool = False,
        predictor: Mapping[str, DerivedPredictor] | None = None,
    ) -> None:
        self.tasks, self.seed = at_least("tasks", tasks, 2), seed
        self.validation_tasks = at_least("validation_tasks", validation_tasks, 1)
        self.bins, self.adaptive = at_least("bins", bins, 1), adaptive
        self.predictors = dict(predictor or {})

    def check(self, task: TaskDistribution) -> None:
        for name, predictor in self.predictors.items():
            with part_of(f"predictor.{name}"):
                predictor.check(task)

    def measure(self, meta_layer: MetaLayer, split: Split, steps: int) -> Measured:
        tasks = TaskSet(meta_layer.task, split, tasks=self.tasks, seed=self.seed)
        validation = TaskSet(meta_layer.task, "validation", tasks=self.validation_tasks, seed=VALIDATION_SEED)
        sources = tasks.sources()
        first = with_variance(meta_layer, validation, steps)
        own = both_answers(first, tasks, steps)
        name = "constant variance" if isinstance(first, ConstantVariance) else "as trained"
        columns = {name: self.rows(own, sources)}
        for name, predictor in self.predictors.items():
            made = predictor.fitted(first, validation, steps)
            change = made.of_distributions
            found = both_answers(made.meta_layer, tasks, steps) if change is None else [a.changed(change) for a in own]
            columns[f"{name} ({made.setting})"] = self.rows(found, sources)
        return Measured(f"uncertainty on {self.tasks} {split} tasks (seed {self.seed}, hash {tasks.hash()})", columns)

    def rows(self, both: Sequence[Answers], sources: Sources | None) -> dict[str, Interval]:
        """The interval of each quality of a predictor, by name, from its answers to own queries and to others'."""
        answers, elsewhere = both
        found = {name: Interval.of(value, sources) for name, value in self.values(answers).items()}
        apart = torch.tensor(strangers(sources, self.tasks))
        if int(apart.sum()) > 1:
            told = calibration.auroc(score(answers), score(elsewhere), answers.mask, elsewhere.mask)
            kept = sources and [names for names, kept in zip(sources, apart.tolist(), strict=True) if kept]
            found["auroc_other_task"] = Interval.of(told[apart], kept)
        return found

    def values(self, answers: Answers) -> dict[str, Tensor]:
        """Each quality of every task, `[tasks]`."""
        if answers.kind == "regression":
            return {
                "nll": calibration.nll(answers),
                "interval_error": calibration.interval_error(answers),
                "coverage_90": calibration.coverage(answers, torch.tensor([0.9], dtype=torch.float64)).squeeze(1),
                "mse": calibration.mse(answers),
            }
        return {
            "nll": calibration.nll(answers),
            "ece": calibration.calibration_error(answers, self.bins, adaptive=self.adaptive),
            "brier": calibration.brier(answers),
            "accuracy": calibration.accuracy(answers),
        }


def both_answers(layer: MetaLayer, tasks: TaskSet, steps: int) -> list[Answers]:
    """The answers to each task's own queries, and to those of the next task."""
    return [predicted_queries(layer, asked, steps) for asked in (tasks, with_next_queries(tasks))]


def with_next_queries(tasks: Iterable[Episode]) -> Iterator[Episode]:
    """Every task with the query set of the task after it; the last one gets that of the first."""
    episodes = iter(tasks)
    held = next(episodes)
    first = first_of(held.query)
    for episode in episodes:
        yield held._replace(query=shifted(held.query, first_of(episode.query)))
        held = episode
    yield held._replace(query=shifted(held.query, first))


def first_of(query: Examples) -> Examples:
    """The query set of the first task alone."""
    return Examples(*(leaf[:1] for leaf in query))


def shifted(query: Examples, after: Examples) -> Examples:
    """The query sets of all tasks but the first, and then another one."""
    return Examples(*(torch.cat([leaf[1:], other]) for leaf, other in zip(query, after, strict=True)))


def strangers(sources: Sources | None, tasks: int) -> list[bool]:
    """Whether each task and the one after it have no source in common."""
    if sources is None:
        return [True] * tasks
    return [not set(names) & set(other) for names, other in zip(sources, [*sources[1:], sources[0]], strict=True)]


def score(answers: Answers) -> Tensor:
    """The uncertainty `[tasks, n]` by which queries from elsewhere are recognised."""
    if answers.kind == "regression":
        return calibration.surprise(answers)
    logs = answers.found.prediction.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
