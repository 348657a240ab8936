"""Measures of generated texts: likeness to real text, copies of the support set, variety, recognition of the source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import at_least

if TYPE_CHECKING:
    # scikit-learn takes a second to import, which a training need not wait for: it is where it is first used.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB

__all__ = ["TaskFit", "copied_ngrams", "copied_share", "distinct_n", "distinct_pieces", "ngram_distance"]

#: The most frequent character n-grams by which the classifier tells sources apart; more made no difference.
FEATURES = 20_000
#: Share of each source's pieces on which the classifier is not trained; at least one, and one is left to train on.
HELD_OUT = 0.2


def ngram_distance(samples: Sequence[str], reference: Sequence[str], n: int) -> float:
    """The Jensen-Shannon distance between two distributions of character n-grams: 0 the same, 1 nothing in common.

    Few texts lie far from anything, themselves drawn again included: compare only sets of equal size, and put the
    distance of as much real text beside.

    Reference: Endres & Schindelin, A new metric for probability distributions, 2003 (IEEE Transactions on Information
        Theory 49:1858-1860): the square root of the Jensen-Shannon divergence, which in bits is at most 1.

    The begin and the end of a text count as a character each. Where either side holds no n-gram, the distance is 1.

    >>> ngram_distance(["ab"], ["ab"], 2), ngram_distance(["ab"], ["cd"], 2)
    (0.0, 1.0)
    """
    counts = Counter(ngrams(samples, n)), Counter(ngrams(reference, n))
    if not (counts[0] and counts[1]):
        return 1.0
    every = sorted(counts[0] | counts[1])
    p, q = (np.array([count[gram] for gram in every]) / count.total() for count in counts)
    middle, divergence = (p + q) / 2, 0.0
    for each in (p, q):
        some = each > 0
        divergence += float(each[some] @ np.log2(each[some] / middle[some])) / 2
    return float(np.sqrt(np.clip(divergence, 0.0, 1.0)))


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
    """All n-grams of characters, with one mark for each text's begin and one for its end: none spans two texts."""
    at_least("n", n, 1)
    marked = (f"\x02{text}\x03" for text in texts)
    return (text[i : i + n] for text in marked for i in range(len(text) - n + 1))


class TaskFit:
    """The share of texts that a classifier, trained on real text of all sources, takes for their source's.

    The classifier is naive Bayes (multinomial, all sources equally likely) on tf-idf of character 1- to 4-grams: on
    pieces of 64 characters of Shakespeare's roles and of the world's languages it recognises about as many as a linear
    support vector machine or logistic regression, and is fitted in a hundredth of their time.

    Real text that it was not trained on, `held_out`, says how much can be recognised at all. Copies of the support set
    are recognised best of all: read it beside `copied_share`.

    Args:
        texts: real text by source, of two sources or more, each with two pieces; what a source repeats counts once.
        length: texts are cut into pieces of so many characters, which should be as long as the texts to judge.

    >>> texts = {"low": ["abcab", "bcabc", "cabca"], "high": ["xyzxy", "yzxyz", "zxyzx"]}
    >>> TaskFit(texts, length=5).score({"high": ["zyx", "abc"]})["task_fit"]
    tensor([0.5000])
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], *, length: int) -> None:
        self.names = list(texts)
        if len(texts) < 2:
            raise InvalidValue("texts", self.names, "must be of at least two sources")
        self.train: dict[str, list[str]] = {}
        self.held_out: dict[str, list[str]] = {}
        generator = np.random.default_rng(0)
        for name, own in texts.items():
            pieces = distinct_pieces(own, length)
            if len(pieces) < 2:
                raise InvalidValue("texts", name, "must have two different texts: to train on, and to hold out")
            order = [pieces[i] for i in generator.permutation(len(pieces))]
            count = min(max(1, round(HELD_OUT * len(pieces))), len(pieces) - 1)
            self.train[name], self.held_out[name] = order[count:], order[:count]

    @cached_property
    def classifier(self) -> tuple[TfidfVectorizer, MultinomialNB]:
        """Texts to features, and features to sources by their place in `names`; fitted to the text to train on."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.naive_bayes import MultinomialNB

        pieces = [piece for own in self.train.values() for piece in own]
        labels = [i for i, own in enumerate(self.train.values()) for _ in own]
        features = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, max_features=FEATURES
        )
        # A prior would favour the sources of which there is most text.
        bayes = MultinomialNB(alpha=0.01, fit_prior=False)
        return features, bayes.fit(features.fit_transform(pieces), labels)

    def score(self, samples: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """How well samples are recognised, by the source that they should resemble, `[sources]` each.

        `task_fit` is the share of a source's texts that are taken for its own, `task_fit_rank` the mean of one over the
        source's place among all, the likeliest first.
        """
        features, bayes = self.classifier
        found = []
        for name, texts in samples.items():
            scores = bayes.predict_joint_log_proba(features.transform(texts))
            own = scores[:, self.names.index(name), None]
            # A text that could be anybody's is nobody's: of equal sources, the own one comes last.
            places = (scores >= own).sum(1)
            found.append((float((places == 1).mean()), float((1 / places).mean())))
        return dict(zip(("task_fit", "task_fit_rank"), torch.tensor(found).unbind(1), strict=True))


def distinct_pieces(texts: Sequence[str], length: int) -> list[str]:
    """Different pieces of at most `length` characters; of a text that is cut, an end of less than half is left out."""
    starts = (range(0, max(len(text) - (length + 1) // 2 + 1, 1), length) for text in texts)
    cut = (text[start : start + length] for text, own in zip(texts, starts, strict=True) for start in own)
    return list(dict.fromkeys(piece for piece in cut if piece))
