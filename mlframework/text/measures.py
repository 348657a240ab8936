"""Measures of generated texts: likeness to real text, copies of the support set, variety, recognition of the source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlframework.errors import InvalidValue

if TYPE_CHECKING:
    # scikit-learn takes a second to import, which a training need not wait for: it is where it is first used.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB

__all__ = ["Recognition", "TaskFit", "copied_ngrams", "copied_share", "distinct_n", "distinct_pieces", "ngram_distance"]

#: Stand for a text's begin and end, so that how texts begin and end counts, and no n-gram spans two texts.
BEGIN, END = "\x02", "\x03"
#: The most frequent character n-grams by which the classifier tells sources apart; more made no difference.
FEATURES = 20_000


def ngram_distance(samples: Sequence[str], reference: Sequence[str], n: int) -> float:
    """The Jensen-Shannon distance between two distributions of character n-grams: 0 the same, 1 nothing in common.

    Few texts lie far from anything, themselves drawn again included: compare only sets of equal size, and put the
    distance of as much real text beside.

    Reference: Endres & Schindelin, A new metric for probability distributions, 2003 (IEEE Transactions on Information
        Theory 49:1858-1860): the square root of the Jensen-Shannon divergence, which in bits is at most 1.

    Args:
        samples: texts.
        reference: texts.
        n: characters; the begin and the end of a text count as one each.

    Returns:
        In [0, 1]; 1 where either holds no n-gram.

    >>> ngram_distance(["ab"], ["ab"], 2), ngram_distance(["ab"], ["cd"], 2)
    (0.0, 1.0)
    """
    counts = Counter(ngrams(samples, n)), Counter(ngrams(reference, n))
    if not (counts[0] and counts[1]):
        return 1.0
    every = sorted(counts[0] | counts[1])
    p, q = (np.array([count[gram] for gram in every]) / count.total() for count in counts)
    middle = (p + q) / 2
    divergence = (information(p, middle) + information(q, middle)) / 2
    return float(np.sqrt(np.clip(divergence, 0.0, 1.0)))


def information(p: np.ndarray, q: np.ndarray) -> float:
    """The Kullback-Leibler divergence in bits of distributions `[values]`, where `q` is 0 only where `p` is."""
    some = p > 0
    return float(p[some] @ np.log2(p[some] / q[some]))


def distinct_n(samples: Sequence[str], n: int) -> float:
    """Distinct character n-grams as a share of all: 0 where there is none. More text has less: compare equal amounts.

    Reference: Li, Galley, Brockett, Gao & Dolan, A diversity-promoting objective function for neural conversation
        models, 2016, arXiv:1510.03055, section 5.2. Deviation: characters, not words, so that any script will do.

    >>> distinct_n(["aaaa"], 2)  # begin, twice a, end: three of five
    0.6
    """
    counts = Counter(ngrams(samples, n))
    return len(counts) / max(counts.total(), 1)


def copied_share(samples: Sequence[str], support: Sequence[str]) -> float:
    """The share of samples that stand in a support text word for word; an empty sample does not count as copied.

    A sample begins and ends where words do, so that "Ann" is not copied from "Joanna". Case and white space at the
    ends are overlooked.

    >>> copied_share(["Ann", "anna", "Joan"], ["Joanna", "Anna Maria"])
    0.3333333333333333
    """
    # A line ends every text, so that nothing is copied across two of them.
    text = "\n".join(line.casefold().strip() for line in support)
    wanted = (sample.casefold().strip() for sample in samples)
    copied = [bool(sample) and bool(re.search(rf"(?<!\w){re.escape(sample)}(?!\w)", text)) for sample in wanted]
    return sum(copied) / max(len(copied), 1)


def copied_ngrams(samples: Sequence[str], support: Sequence[str], n: int = 10) -> float:
    """The share of the samples' character n-grams that stand in the support: long texts copy pieces.

    Texts shorter than `n` characters have none; their begin and end do not count as characters here.

    >>> copied_ngrams(["to be or no"], ["it is to be or not"], n=10)
    1.0
    """
    known = {text[i : i + n] for text in support for i in range(len(text) - n + 1)}
    found = [text[i : i + n] in known for text in samples for i in range(len(text) - n + 1)]
    return sum(found) / max(len(found), 1)


def ngrams(texts: Sequence[str], n: int) -> Iterator[str]:
    """All n-grams of characters, with one mark for the begin of each text and one for its end."""
    if n < 1:
        raise InvalidValue("n", n, "must be at least 1")
    marked = (f"{BEGIN}{text}{END}" for text in texts)
    return (text[i : i + n] for text in marked for i in range(len(text) - n + 1))


class Recognition(NamedTuple):
    """How well the sources of texts were recognised.

    Attributes:
        accuracy: share of a source's texts that were taken for its own, `[sources]`.
        reciprocal_rank: mean of one over the place of the source among all, the likeliest first, `[sources]`.
    """

    accuracy: Tensor
    reciprocal_rank: Tensor


class TaskFit:
    """The share of texts that a classifier, trained on real text of all sources, takes for their source's.

    The classifier is naive Bayes (multinomial, all sources equally likely) on tf-idf of character 1- to 4-grams: on
    pieces of 64 characters of Shakespeare's roles and of the world's languages it recognises about as many as a linear
    support vector machine or logistic regression, and is fitted in a hundredth of their time.

    Real text that it was not trained on says how much can be recognised at all (`ceiling`). Copies of the support set
    are recognised best of all: read it beside `copied_share`.

    Args:
        texts: real text by source; a text that a source repeats counts once.
        length: texts are cut into pieces of so many characters, which should be as long as the texts to judge; None
            leaves them whole.
        held_out: share of each source's pieces that make the ceiling; at least one, and one is left to train on.
        seed: of the draw of these.

    >>> texts = {"low": ["abcab", "bcabc", "cabca"], "high": ["xyzxy", "yzxyz", "zxyzx"]}
    >>> TaskFit(texts).score({"high": ["zyx", "abc"]}).accuracy
    tensor([0.5000])
    """

    def __init__(
        self, texts: Mapping[str, Sequence[str]], *, length: int | None = None, held_out: float = 0.2, seed: int = 0
    ) -> None:
        if length is not None and length < 1:
            raise InvalidValue("length", length, "must be at least 1, or null for whole texts")
        if not 0 < held_out < 1:
            raise InvalidValue("held_out", held_out, "must lie between 0 and 1")
        if len(texts) < 2:
            raise InvalidValue("texts", list(texts), "must be of at least two sources")
        self.pieces = {name: distinct_pieces(own, length) for name, own in texts.items()}
        for name, pieces in self.pieces.items():
            if len(pieces) < 2:
                why = "must have at least two different texts: to train on, and to hold out"
                raise InvalidValue("texts", name, why)
        self.names, self.held_out, self.seed = list(self.pieces), held_out, seed

    @cached_property
    def parts(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Each source's pieces to train on, and those held out."""
        generator = np.random.default_rng(self.seed)
        train, held_out = {}, {}
        for name, pieces in self.pieces.items():
            order = [pieces[i] for i in generator.permutation(len(pieces))]
            count = min(max(1, round(self.held_out * len(pieces))), len(pieces) - 1)
            train[name], held_out[name] = order[count:], order[:count]
        return train, held_out

    @cached_property
    def classifier(self) -> tuple[TfidfVectorizer, MultinomialNB]:
        """Texts to features, and features to sources by their place in `names`; fitted to the text to train on."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.naive_bayes import MultinomialNB

        pieces = [piece for own in self.parts[0].values() for piece in own]
        labels = [i for i, own in enumerate(self.parts[0].values()) for _ in own]
        features = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, max_features=FEATURES
        )
        # A prior would favour the sources of which there is most text.
        bayes = MultinomialNB(alpha=0.01, fit_prior=False)
        return features, bayes.fit(features.fit_transform(pieces), labels)

    @cached_property
    def ceiling(self) -> Recognition:
        """The recognition of held-out real text of each source, in the order of `names`."""
        return self.score(self.parts[1])

    def score(self, samples: Mapping[str, Sequence[str]]) -> Recognition:
        """The recognition of samples, by the source that they should resemble."""
        found = [self.recognised(name, texts) for name, texts in samples.items()]
        return Recognition(*torch.tensor(found).reshape(-1, 2).unbind(1))

    def recognised(self, name: str, texts: Sequence[str]) -> tuple[float, float]:
        """The accuracy and the mean reciprocal rank of one source's samples."""
        if name not in self.pieces:
            raise InvalidValue("samples", name, "is none of the sources that the classifier was trained on")
        if not texts:
            raise InvalidValue("samples", name, "has no text to judge")
        features, bayes = self.classifier
        scores = bayes.predict_joint_log_proba(features.transform(texts))
        own = scores[:, self.names.index(name), None]
        # A text that could be anybody's is nobody's: of equal sources, the own one comes last.
        places = (scores >= own).sum(1)
        return float((places == 1).mean()), float((1 / places).mean())


def distinct_pieces(texts: Sequence[str], length: int | None) -> list[str]:
    """Different pieces of at most `length` characters; of a text that is cut, an end of less than half is left out."""
    if length is None:
        return list(dict.fromkeys(text for text in texts if text))
    starts = (range(0, max(len(text) - (length + 1) // 2 + 1, 1), length) for text in texts)
    cut = (text[start : start + length] for text, own in zip(texts, starts, strict=True) for start in own)
    return list(dict.fromkeys(piece for piece in cut if piece))
