"""The quality of generated texts: their likeness to real text, copies of the support set, and whose they seem."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mlframework.episode import Examples, Split
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.part import Display, Log, Measure, Validated
from mlframework.evaluation.report import Measured
from mlframework.inner_loop.inner_loop import ends
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text.text_tasks import TextTasks, as_text
from mlframework.text import measures
from mlframework.text.generation import Sampling, generate

__all__ = ["TextQuality"]

logger = logging.getLogger(__name__)


class SourceTexts(NamedTuple):
    """Texts of one source."""

    name: str  # of the source
    support: list[str]  # the support set
    real: list[str]  # other text of it
    reference: list[str]  # more of that, to compare with
    made: dict[str, list[str]]  # texts generated `before` and `after` adapting

    def judge(self, texts: Sequence[str]) -> dict[str, float]:
        """The measures of some texts that should be like this source's."""
        return {
            "ngram_distance": measures.ngram_distance(texts, self.reference, 2),
            "copied_share": measures.copied_share(texts, self.support),
            "copied_10grams": measures.copied_ngrams(texts, self.support),
            "distinct_3": measures.distinct_n(texts, 3),
        }


class TextQuality(Measure, Display):
    """Judges generated texts of held-out sources, each adapted to by one support set.

    `task_fit` is the share of texts that a classifier, trained on real text of all sources of the split, takes for the
    source's own; `task_fit_rank` one over the source's place among all. `ngram_distance` is the distance of character
    bigrams from as many real texts, `copied_share` and `copied_10grams` the share that stands in the support set,
    `distinct_3` variety.

    The columns are `before` and `after` adapting (an algorithm without inner steps has no `before`), and `real`: real
    text of the same sources beside the support sets, which the classifier has not seen.

    Args:
        sources: how many, the first ones of the split.
        texts: drawn for each.
        temperature, top_p: see `Sampling`.
        seed: of all draws.
    """

    def __init__(
        self, *, sources: int = 20, texts: int = 20, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        Sampling(temperature=temperature, top_p=top_p).check()
        self.sources, self.texts = at_least("sources", sources, 1), at_least("texts", texts, 1)
        self.temperature, self.top_p, self.seed = temperature, top_p, seed

    def check(self, task: TaskDistribution) -> None:
        as_text(task)

    def show(self, validated: Validated, log: Log) -> None:
        """Writes the mean of each measure on validation sources."""
        layer = validated.meta_layer
        measured = self.measure(layer, "validation", layer.test_inner_steps)
        for when, column in measured.columns.items() if measured else ():
            log.scalars({f"validation/samples_{when}/{n}": i.mean for n, i in column.items()}, validated.step)

    def measure(self, meta_layer: MetaLayer, split: Split, steps: int) -> Measured | None:
        """Generates and judges; None, and a line in the log, where there are not two sources to tell apart."""
        task = as_text(meta_layer.task)
        texts = told_apart(task, split)
        if len(texts) < 2:
            logger.warning("generated texts are not judged: there are not two sources with two pieces of text each")
            return None
        # Pieces as long as the generated texts; the texts of a list are mostly shorter, and stay whole.
        fit = measures.TaskFit(texts, length=task.length)
        numbers = [number for number, source in enumerate(task.sources(split)) if source.name in texts]
        found = [self.texts_of(meta_layer, split, number, steps) for number in numbers[: self.sources]]
        stages = ("before", "after") if meta_layer.test_inner_steps else ("after",)
        made = {stage: {each.name: each.made[stage] for each in found} for stage in stages}
        columns = {stage: judged_texts(task, found, own, fit.score(own)) for stage, own in made.items()}
        # The classifier knows the real text that it was trained on: only the rest is a fair ceiling.
        ceiling = fit.score({each.name: fit.held_out[each.name] for each in found})
        columns["real"] = judged_texts(task, found, {each.name: each.real for each in found}, ceiling)
        return Measured(f"generated texts of {split} sources", columns)

    def texts_of(self, meta_layer: MetaLayer, split: Split, number: int, steps: int) -> SourceTexts:
        """The support set of one source, other real text of it, and texts generated before and after adapting."""
        task, device = as_text(meta_layer.task), next(meta_layer.parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        support = task.draw(torch.tensor([number]), split, generator).support
        with torch.no_grad():
            models = ends(meta_layer.trajectory(support.to(device), steps))
        sampling = Sampling(task.length, self.temperature, self.top_p)
        made = {
            stage: generate(meta_layer, adapted, count=self.texts, sampling=sampling, generator=generator)
            for stage, adapted in zip(("before", "after"), (models[0], models[-1]), strict=True)
        }
        unseen = texts_beside(task, split, number, support)[: 2 * self.texts]
        given = row_texts(task, support.y[0], support.mask[0])
        return SourceTexts(task.sources(split)[number].name, given, unseen[::2], unseen[1::2], made)


def judged_texts(
    task: TextTasks, found: Sequence[SourceTexts], texts: Mapping[str, Sequence[str]], fit: Mapping[str, Tensor]
) -> dict[str, Interval]:
    """The measures of some texts of each source; `fit` holds the classifier's."""
    judged = [each.judge(texts[each.name]) for each in found]
    values = {**fit, **{name: torch.tensor([each[name] for each in judged]) for name in judged[0]}}
    sources = [(task.source_of(each.name),) for each in found]
    return {name: Interval.of(value, sources) for name, value in values.items()}


def told_apart(task: TextTasks, split: Split) -> dict[str, Sequence[str]]:
    """The texts of each of the split's sources, or of all splits' if it has one source; two pieces at least."""
    splits = [split] if len(task.sources(split)) > 1 else list(get_args(Split))
    sources = (source for each in splits for source in task.sources(each))
    return {s.name: s.texts for s in sources if len(measures.distinct_pieces(s.texts, task.length)) > 1}


def texts_beside(task: TextTasks, split: Split, number: int, support: Examples) -> list[str]:
    """The texts of a source's rows, from its end, without those of a support set `[1, rows, length]`."""
    rows = task.rows(split)
    end = int(rows.sizes[: number + 1].sum())
    examples = rows.examples(torch.arange(end - int(rows.sizes[number]), end).flip(0))
    known = {tuple(row) for row in support.y[0].tolist()}
    other = torch.tensor([tuple(row) not in known for row in examples.y.tolist()])
    return row_texts(task, examples.y[other], examples.mask[other])


def row_texts(task: TextTasks, y: Tensor, mask: Tensor) -> list[str]:
    """The texts of rows of targets `[n, length]`, each without the boundaries in it."""
    rows = (row[counts > 0].tolist() for row, counts in zip(y, mask, strict=True))
    boundary = task.tokens.boundary
    return [task.tokens.decode(token for token in row if token != boundary) for row in rows]
