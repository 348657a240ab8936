"""Intervals over sources: they cover the mean as often as they say where tasks share a source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mlframework.evaluation.interval import Interval, half_width_over_sources
from mlframework.evaluation.task_set import TaskSet
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid
from mlframework.tasks.text.text_lists import TextLists

#: Tasks of each of twelve languages, as unequal as those of `text_lists`: the first has 44 % of them.
SIZES = (132, 30, 25, 20, 18, 15, 14, 13, 12, 9, 7, 5)


def one_source_each() -> list[tuple[str, ...]]:
    return [(f"language {number}",) for number, size in enumerate(SIZES) for _ in range(size)]


def clustered(generator: np.random.Generator, sources: list[tuple[str, ...]]) -> torch.Tensor:
    """Values with mean 0 that share a deviation with all tasks of the same source."""
    names = sorted({name for task in sources for name in task})
    effects = dict(zip(names, generator.normal(size=len(names)), strict=True))
    return torch.tensor([sum(effects[name] for name in task) + 0.5 * generator.normal() for task in sources])


def coverage(sources: list[tuple[str, ...]], trials: int) -> tuple[float, float]:
    """How often the interval over sources and that over tasks cover the mean."""
    generator, over_sources, over_tasks = np.random.default_rng(0), 0, 0
    for _ in range(trials):
        interval = Interval.of(clustered(generator, sources), sources)
        over_sources += abs(interval.mean) <= interval.over_sources
        over_tasks += abs(interval.mean) <= interval.half_width
    return over_sources / trials, over_tasks / trials


def test_the_interval_over_twelve_equal_sources_covers_as_often_as_it_says():
    over_sources, over_tasks = coverage([(f"role {n % 12}",) for n in range(240)], 300)
    assert over_sources == pytest.approx(0.95, abs=0.04)
    assert over_tasks < 0.5


def test_the_interval_over_unequal_sources_covers_far_more_often_than_that_over_tasks():
    over_sources, over_tasks = coverage(one_source_each(), 300)
    assert over_sources == pytest.approx(0.95, abs=0.04)
    assert over_tasks < 0.3


def test_the_interval_over_the_classes_of_tasks_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    sources = [tuple(f"class {n}" for n in generator.choice(60, size=5, replace=False)) for _ in range(300)]
    over_sources, over_tasks = coverage(sources, 300)
    assert over_sources == pytest.approx(0.95, abs=0.04)
    assert over_tasks < over_sources - 0.1


def test_the_interval_over_sources_is_that_of_a_bootstrap_over_sources():
    """By scipy: sources are drawn with replacement, each with all its tasks."""
    generator = np.random.default_rng(2)
    sources = [(f"source {n}",) for n in range(200) for _ in range(1 + n % 4)]
    values = clustered(generator, sources)
    names = sorted({task[0] for task in sources})
    of = np.array([names.index(task[0]) for task in sources])
    sums, counts = np.bincount(of, values.numpy()), np.bincount(of)
    found = stats.bootstrap(
        (sums, counts), lambda s, n, axis=-1: s.sum(axis) / n.sum(axis), paired=True, rng=generator, n_resamples=4000
    )
    half_width = half_width_over_sources(values, sources)
    quantile = stats.t.ppf(0.975, counts.sum() ** 2 / (counts**2).sum() - 1)
    assert half_width / quantile == pytest.approx(found.standard_error, rel=0.05)


def test_with_a_source_for_each_task_both_intervals_are_one():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    interval = Interval.of(values, [(str(n),) for n in range(30)])
    assert interval.over_sources == pytest.approx(interval.half_width, rel=1e-6)


def test_there_is_no_interval_over_sources_where_these_are_too_few():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert half_width_over_sources(values, [("only",)] * 20) is None
    most = [("a", "b", "c"), ("a", "b", "d"), ("b", "c", "d"), ("a", "c", "d")] * 5
    assert half_width_over_sources(values, most) is None


def classes(names: tuple[str, ...]) -> ArrayTasks:
    """Every example of a class holds the number of the class."""
    numbers = torch.arange(len(names)).repeat_interleave(4)
    data = ClassIndexed(numbers[:, None].float(), torch.full((len(names),), 4), names)
    return ArrayTasks({"test": data}, n_way=3, k_shot=1, k_query=2)


def test_the_sources_of_a_classification_are_the_classes_that_were_drawn():
    names = tuple(f"character {n}" for n in range(9))
    tasks = TaskSet(classes(names), "test", tasks=12, seed=5, chunk=12)
    (episode,) = tasks
    drawn = [tuple(sorted(names[int(n)] for n in row.flatten().unique())) for row in episode.support.x]
    assert tasks.sources() == drawn


def test_a_part_of_a_set_has_the_sources_of_its_own_tasks():
    tasks = TaskSet(classes(tuple(f"character {n}" for n in range(9))), "test", tasks=12, seed=5)
    whole, part = tasks.sources(), tasks.part(slice(4, 9))
    assert whole is not None and whole[:5] != whole[4:9]
    assert part.sources() == whole[4:9] and part.part(slice(1, 3)).sources() == whole[5:7]


def test_the_sources_of_text_are_languages_that_the_texts_are_of():
    task = TextLists(k_shot=2, k_query=2, length=16)
    tasks = TaskSet(task, "test", tasks=8, seed=3, chunk=8)
    (episode,) = tasks
    for number, (language,) in enumerate(tasks.sources()):
        own = {
            tuple(row)
            for s, rows in zip(task.sources("test"), split_rows(task), strict=True)
            if s.name.startswith(language)
            for row in rows.tolist()
        }
        assert all(tuple(row) in own for row in episode.query.x[number].tolist())


def split_rows(task: TextLists) -> tuple[torch.Tensor, ...]:
    """The inputs of each source's rows."""
    rows = task.rows("test")
    return rows.windows[:, :-1].long().split(rows.sizes.tolist())


def test_tasks_of_a_continuous_distribution_are_sources_of_their_own():
    assert TaskSet(Sinusoid(), "test", tasks=3, seed=0).sources() is None
