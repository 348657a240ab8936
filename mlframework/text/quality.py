"""How well a text model generates: whose its texts seem, how like real text they are, what they copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch

from mlframework.episode import Split
from mlframework.errors import InvalidValue
from mlframework.judging import Interval
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.text import TextTasks
from mlframework.text.generation import Sampling, generate
from mlframework.text.measures import TaskFit, copied_ngrams, copied_share, distinct_n, distinct_pieces, ngram_distance

__all__ = ["Quality", "TextQuality", "judge_quality"]

#: Characters of the n-grams whose distributions are compared.
DISTANCE_N = 2

#: Measures of a source's texts, given real text of as many and the support texts.
MEASURES: dict[str, Callable[[Sequence[str], Sequence[str], Sequence[str]], float]] = {
    "ngram_distance": lambda texts, real, support: ngram_distance(texts, real, DISTANCE_N),
    "copied_share": lambda texts, real, support: copied_share(texts, support),
    "copied_10grams": lambda texts, real, support: copied_ngrams(texts, support),
    "distinct_3": lambda texts, real, support: distinct_n(texts, 3),
}

Texts = dict[str, list[str]]


class Quality(NamedTuple):
    """Each measure's interval over sources.

    Attributes:
        before: of texts drawn before adaptation; None for an algorithm without inner steps.
        after: of texts drawn after it.
        real: of real text of the same sources that is in no support set.
    """

    before: dict[str, Interval] | None
    after: dict[str, Interval]
    real: dict[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; an interval is its mean, half width and number of values."""
        found = {key: value for key, value in self._asdict().items() if value is not None}
        return {key: {name: i._asdict() for name, i in measures.items()} for key, measures in found.items()}


class TextQuality:
    """Judges generated texts of held-out sources, each adapted to by one support set.

    `task_fit` is the share of texts that a classifier, trained on real text of all sources of the split, takes for the
    source's own; `task_fit_rank` one over the source's place among all. `ngram_distance` is that of character bigrams
    from as many real texts, `copied_share` and `copied_10grams` what stands in the support set, `distinct_3` variety.

    Args:
        sources: how many, the first ones of the split.
        texts: drawn for each.
        temperature, top_p: see `Sampling`.
        seed: of all draws.
    """

    def __init__(
        self, *, sources: int = 20, texts: int = 20, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        for field, value in {"sources": sources, "texts": texts}.items():
            if value < 1:
                raise InvalidValue(field, value, "must be at least 1")
        self.sources, self.texts, self.temperature, self.top_p, self.seed = sources, texts, temperature, top_p, seed

    def run(self, meta_layer: MetaLayer, task: TextTasks, split: Split, *, device: torch.device) -> Quality:
        """Generates and judges."""
        return judge_quality(self, meta_layer, task, split, device=device)


def judge_quality(
    settings: TextQuality, meta_layer: MetaLayer, task: TextTasks, split: Split, *, device: torch.device
) -> Quality:
    """Generates for the sources of a split, and judges what came."""
    # As long as what is generated; the texts of a list are mostly shorter, and are whole then.
    fit = TaskFit(told_apart(task, split), length=task.length)
    chosen = [(i, source) for i, source in enumerate(task.sources(split)) if source.name in fit.pieces]
    sampling = Sampling(task.spec.x_shape[0], settings.temperature, settings.top_p)
    before: Texts = {}
    after: Texts = {}
    support: Texts = {}
    real: Texts = {}
    reference: Texts = {}
    for number, source in chosen[: settings.sources]:
        generator = torch.Generator().manual_seed(settings.seed)
        episode = task.draw(torch.tensor([number]), split, generator).to(device)
        with torch.no_grad():
            models = list(meta_layer.trajectory(episode.support, meta_layer.test_inner_steps))
        support[source.name] = texts_of(task, episode.support.y[0], episode.support.mask[0])
        unseen = held_out(source.texts, support[source.name], 2 * settings.texts)
        real[source.name], reference[source.name] = unseen[::2], unseen[1::2]
        for texts, adapted in ((before, models[0]), (after, models[-1])):
            texts[source.name] = generate(
                meta_layer, adapted, count=settings.texts, sampling=sampling, generator=generator
            )

    def judged(texts: Mapping[str, Sequence[str]]) -> dict[str, Interval]:
        recognised = fit.score({name: some if any(some) else [""] for name, some in texts.items()})
        found = {"task_fit": recognised.accuracy, "task_fit_rank": recognised.reciprocal_rank}
        for name, measure in MEASURES.items():
            values = [measure(texts[source], reference[source], support[source]) for source in texts]
            found[name] = torch.tensor(values)
        return {name: Interval.of(values) for name, values in found.items()}

    return Quality(judged(before) if meta_layer.test_inner_steps else None, judged(after), judged(real))


def told_apart(task: TextTasks, split: Split) -> dict[str, Sequence[str]]:
    """The texts of the sources among which one must be recognised: those of the split, or all where it has but one.

    A source that has not two pieces of text is left out.
    """
    splits = [split] if len(task.sources(split)) > 1 else list(get_args(Split))
    sources = (source for each in splits for source in task.sources(each))
    return {s.name: s.texts for s in sources if len(distinct_pieces(s.texts, task.length)) > 1}


def texts_of(task: TextTasks, y: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """The texts of rows of targets `[n, length]`, boundaries taken for line ends."""
    rows = (row[counts > 0].tolist() for row, counts in zip(y, mask, strict=True))
    boundary = task.tokens.boundary
    return [task.tokens.decode(token for token in row if token != boundary) for row in rows]


def held_out(texts: Sequence[str], support: Sequence[str], count: int) -> list[str]:
    """Real texts from the end of a source, `count` at most and two at least, that do not stand in the support set."""
    known = "\n".join(support)
    return [text for text in reversed(texts) if text not in known][:count] or list(texts[-2:])
