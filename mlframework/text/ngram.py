"""An n-gram language model of a task's support set and of all training text: the bar for learned text models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mlframework.episode import Episode, Examples
from mlframework.inner_loop.inner_update import at_least

__all__ = ["NGramModel"]

#: Counts that have a discount of their own: once, twice, three times or more.
CLASSES = 3
#: Classes of how often a context was seen: never, 1-2 times, 3-6, 7-14, ...; all above is in the last.
BUCKETS = 11
#: No discount is closer than this to nothing or to the whole count, so that shorter contexts always keep a share.
MARGIN = 0.01
#: Standard deviation of the Gaussian prior on the tuned weights; it matters only where tasks give little evidence.
PRIOR_SCALE = 2.0


class Text(NamedTuple):
    """Rows of tokens. A token that does not count is no context of others either: a row begins anew behind it.

    Attributes:
        owner: whose text a row is, `[rows]`.
        tokens: the token before the first target, then the targets: `[rows, length + 1]`.
        known: which of them count, `[rows, length + 1]`.
    """

    owner: np.ndarray
    tokens: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Text:
        """Rows of tasks `[tasks, n, length]`, `y` being `x` one token further; a task owns its rows."""
        known = mask.flatten(0, 1) > 0
        tokens = torch.cat([x[..., :1], y], dim=-1).flatten(0, 1)
        owner = np.repeat(np.arange(len(x)), x.shape[1])
        return cls(owner, tokens.cpu().numpy(), torch.cat([known[:, :1], known], dim=1).cpu().numpy())

    @property
    def targets(self) -> np.ndarray:
        """The tokens to predict, `[rows, length + 1]`: all that count, but for the first of each row."""
        return self.known & (np.arange(self.known.shape[1]) > 0)

    @property
    def first_contexts(self) -> np.ndarray:
        """The contexts of single tokens are the texts' owners, from 1 on: `[rows, length + 1]`."""
        return np.broadcast_to(self.owner[:, None] + 1, self.tokens.shape)


class Found(NamedTuple):
    """The counts of the n-grams of one order that end in given targets.

    Attributes:
        times: the count of the n-gram itself, `[targets]`.
        total: of all n-grams with its context, `[targets]`.
        kinds: how many tokens have a count of one, of two, of more after the context, `[CLASSES, targets]`.
    """

    times: np.ndarray
    total: np.ndarray
    kinds: np.ndarray


class Order(NamedTuple):
    """The n-grams of one order that stand in some text.

    An n-gram's number is its place in `keys`, and 0 stands for none. Its key is made of its context's number among the
    n-grams of the order below (of order 1: of the text's owner) and of its last token, so that any order and vocabulary
    are exact.

    Attributes:
        keys: sorted, `[grams]`; the first, 0, is no n-gram's.
        counts: `[grams]`; see `places`.
        totals: of the counts after each context, `[contexts]`.
        kinds: how many tokens have a count of one, of two, of more after a context, `[CLASSES, contexts]`.
    """

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, *, contexts: int, vocabulary: int) -> Order:
        """The n-grams of one order by their counts; those without are but the contexts of others."""
        context = keys // vocabulary
        totals = np.bincount(context, counts, minlength=contexts).astype(np.int64)
        classes = np.minimum(counts, CLASSES)
        kinds = [np.bincount(context[classes == c], minlength=contexts) for c in range(1, CLASSES + 1)]
        return cls(keys, counts, totals, np.stack(kinds))

    def numbers(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key, 0 where there is no such n-gram."""
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, place, 0)


class Counts:
    """The n-grams of some text of at most `order` tokens, those of each of its owners by themselves."""

    def __init__(self, text: Text, *, owners: int, order: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.orders: list[Order] = []
        contexts = owners + 1
        keys, grams = self.number(text, text.first_contexts)
        for further in reversed(range(order)):
            longer_keys, longer = self.number(text, one_further(grams)) if further else (keys, np.zeros_like(grams))
            counts = places(text, grams, longer, len(keys))
            self.orders.append(Order.of(keys, counts, contexts=contexts, vocabulary=vocabulary))
            contexts, keys, grams = len(keys), longer_keys, longer

    def keys(self, text: Text, contexts: np.ndarray) -> np.ndarray:
        """The key of the n-gram at each token, `[rows, length + 1]`; 0 where is none."""
        return np.where(text.known & (contexts > 0), contexts * self.vocabulary + text.tokens, 0)

    def number(self, text: Text, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sorted keys of the n-grams with the given contexts, and the number of that at each token."""
        found = self.keys(text, contexts)
        keys, numbers = np.unique(np.append(found, 0), return_inverse=True)
        return keys, numbers[:-1].reshape(found.shape)

    def find(self, text: Text) -> Iterator[Found]:
        """The counts of the n-grams of order 1, 2, ... that end in a text's targets."""
        contexts, targets = text.first_contexts, text.targets
        for order in self.orders:
            grams = order.numbers(self.keys(text, contexts))
            before = contexts[targets]
            yield Found(order.counts[grams[targets]], order.totals[before], order.kinds[:, before])
            contexts = one_further(grams)


def one_further(grams: np.ndarray) -> np.ndarray:
    """The number of the n-gram before each token, its context: `[rows, length + 1]`, 0 at the beginning."""
    return np.pad(grams[:, :-1], ((0, 0), (1, 0)))


def places(text: Text, grams: np.ndarray, longer: np.ndarray, size: int) -> np.ndarray:
    """In how many places each n-gram stands: different tokens before it, and beginnings of rows.

    These are Kneser and Ney's counts of lower orders. Where nothing is longer, every occurrence is a place.

    Args:
        grams: the n-gram that ends at each token, `[rows, length + 1]`.
        longer: the same of n-grams that are one token longer; 0 is none.
        size: numbers of n-grams.

    Returns:
        `[size]`.
    """
    endings = np.zeros(longer.max() + 1, dtype=np.int64)
    endings[longer] = grams * (longer > 0)
    beginnings = grams * (text.targets & (longer == 0))
    counts = np.bincount(endings, minlength=size) + np.bincount(beginnings.flatten(), minlength=size)
    counts[0] = 0
    return counts


class Background:
    """Interpolated modified Kneser-Ney smoothing of the n-grams of a large text, which has one owner.

    Reference: Chen & Goodman, An empirical study of smoothing techniques for language modeling, 1999 (Computer Speech
        and Language 13:359-394), equations 18-26. Where the counts of counts do not give discounts (a small text, or
        single tokens that are all frequent), they are half the count.
    """

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.discounts = [modified_discounts(order.counts) for order in counts.orders]

    def probabilities(self, text: Text) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For contexts of 0, 1, ... tokens: the targets' probabilities, how often their contexts were seen."""
        below = np.full(text.targets.sum(), 1 / self.counts.vocabulary)
        shared = text._replace(owner=np.zeros_like(text.owner))
        for found, discounts in zip(self.counts.find(shared), self.discounts, strict=True):
            seen = found.total > 0
            kept = found.times - discounts[found.times.clip(1, CLASSES) - 1]
            given = np.where(found.times > 0, kept, 0.0) + discounts @ found.kinds * below
            below = np.where(seen, given / found.total.clip(min=1), below)
            yield below, found.total


def modified_discounts(counts: np.ndarray) -> np.ndarray:
    """The discounts of counts of one, two, and three or more, `[CLASSES]` (Chen & Goodman 1999, equation 26)."""
    whole = np.arange(1.0, CLASSES + 1)
    ones, twos, threes, fours = (np.count_nonzero(counts == times) for times in range(1, 5))
    if not (ones and twos and threes and fours):
        return whole / 2
    once = ones / (ones + 2 * twos)
    raised = whole - (whole + 1) * once * np.array([twos / ones, threes / twos, fours / threes])
    return raised.clip(MARGIN, whole - MARGIN)


class Evidence(NamedTuple):
    """All that the weights need to know of some queries' targets, for contexts of 0, 1, ... tokens.

    Attributes:
        background: probabilities in the background, `[order, targets]`.
        trust: place in the table of weights: how often the background saw the context, and how often the support set
            saw the one that is a token shorter; `[order, targets]`.
        known: whether the background saw the context at all, `[order, targets]`.
        times, total: of the support set, see `Found`; `[order, targets]`.
        kinds: see `Found`; `[order, CLASSES, targets]`.
    """

    background: Tensor
    trust: Tensor
    known: Tensor
    times: Tensor
    total: Tensor
    kinds: Tensor


class Weights(nn.Module):
    """How a support set's n-grams are discounted and how far the background is trusted; tuned on other tasks."""

    def __init__(self, order: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.discounts = nn.Parameter(torch.zeros(order, CLASSES, dtype=torch.float64))
        self.trust = nn.Parameter(torch.zeros(order, BUCKETS * BUCKETS, dtype=torch.float64))

    def forward(self, evidence: Evidence) -> Tensor:
        """Logarithms of the targets' probabilities `[targets]`."""
        whole = torch.arange(1, CLASSES + 1, dtype=torch.float64)
        probability = torch.full_like(evidence.background[0], 1 / self.vocabulary)
        by_order = map(Evidence._make, zip(*evidence, strict=True))
        for discounts, trust, seen in zip(self.discounts, self.trust, by_order, strict=True):
            trusted = trust.sigmoid()[seen.trust] * seen.known
            mixed = trusted * seen.background + (1 - trusted) * probability
            taken = discounts.sigmoid() * (whole - 2 * MARGIN) + MARGIN
            kept = (seen.times - taken[seen.times.clamp(1, CLASSES) - 1]) * (seen.times > 0)
            given = (kept + taken @ seen.kinds.to(taken.dtype) * mixed) / seen.total.clamp(min=1)
            probability = torch.where(seen.total > 0, given, mixed)
        return probability.log()


class NGramModel:
    """An n-gram model of each task's support set that falls back on one of all training text.

    After a context h of k tokens, the support set's discounted counts keep what is left for

        trust * background(token | h) + (1 - trust) * adapted(token | the last k - 1 tokens of h),

    and so on down to the uniform distribution. Both models are Kneser-Ney's. The background's discounts follow from
    its counts; the support set's, which is too small for that, and `trust`, which depends on k, on how often the
    background saw h and how often the support set saw its last k - 1 tokens, are tuned on other tasks (maximum
    likelihood by L-BFGS). Text before a row's first token is not seen, as it is not by the learned models.

    Reference: Wood & Teh, A hierarchical nonparametric Bayesian approach to statistical language model domain
        adaptation, 2009 (AISTATS, PMLR 5:607-614), section 4: the same two ways to fall back. Deviations: absolute
        discounts in the place of Pitman-Yor processes (one seat per place, concentration 0), and weights by how often
        contexts were seen (Jelinek & Mercer 1980).

    Args:
        vocabulary: different tokens.
        order: tokens of the longest n-grams. Of bytes, many scripts need three for a character.

    >>> model = NGramModel(vocabulary=5, order=3)
    >>> x = torch.tensor([[[4, 0, 1, 0]]])
    >>> rows = Examples(x, torch.tensor([[[0, 1, 0, 1]]]), torch.ones(1, 1, 4))
    >>> model.log_probabilities(rows, rows).exp() > 1 / 5
    tensor([[[True, True, True, True]]])
    """

    def __init__(self, vocabulary: int, *, order: int = 12) -> None:
        self.vocabulary, self.order = at_least("vocabulary", vocabulary, 1), at_least("order", order, 1)
        self.background: Background | None = None
        self.weights = Weights(order, vocabulary)

    def fit_background(self, rows: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Counts all training text anew.

        Args:
            rows: tokens `[rows, length]`; the longer the rows, the fewer contexts are cut.
            targets: the tokens that follow, `[rows, length]`: the same rows one token further.
            mask: 1 where a target counts, `[rows, length]`.
        """
        text = Text.of(rows[None], targets[None], mask[None])
        self.background = Background(Counts(text, owners=1, order=self.order, vocabulary=self.vocabulary))

    def tune(self, episodes: Iterable[Episode], *, iterations: int = 40) -> None:
        """Chooses discounts and trust by the likelihood of queries, given their support sets.

        Args:
            episodes: tasks that are not in the background, or it is trusted too much: validation tasks.
            iterations: of L-BFGS, each on all the tasks.
        """
        found = [self.evidence(episode.support, episode.query) for episode in episodes]
        evidence = Evidence(*(torch.cat(parts, dim=-1) for parts in zip(*found, strict=True)))
        self.weights = Weights(self.order, self.vocabulary)
        parameters = list(self.weights.parameters())
        optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            surprise = -self.weights(evidence).sum()
            prior = sum((p.square().sum() for p in parameters), torch.zeros(())) / (2 * PRIOR_SCALE**2)
            value = (surprise + prior) / evidence.total.shape[-1]
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)

    def log_probabilities(self, support: Examples, query: Examples) -> Tensor:
        """Logarithms (in nats) of the probabilities of queries' targets, each given the tokens before it in its row.

        Args:
            support: the text that each task may count, leaves `[tasks, n_support, length]`.
            query: leaves `[tasks, n, length]`.

        Returns:
            float64 `[tasks, n, length]`, 0 where the mask leaves a target out.
        """
        values = torch.zeros(query.mask.shape, dtype=torch.float64, device=query.mask.device)
        with torch.no_grad():
            values[query.mask > 0] = self.weights(self.evidence(support, query)).to(values.device)
        return values

    def evidence(self, support: Examples, query: Examples) -> Evidence:
        """The counts in the background and in support sets of the n-grams that end in queries' targets."""
        text = Text.of(*query)
        counts = Counts(Text.of(*support), owners=len(support.mask), order=self.order, vocabulary=self.vocabulary)
        times, total, kinds = (torch.from_numpy(np.stack(leaf)) for leaf in zip(*counts.find(text), strict=True))
        if self.background is None:
            background, seen = torch.zeros(total.shape, dtype=torch.float64), torch.zeros_like(total)
        else:
            both = zip(*self.background.probabilities(text), strict=True)
            background, seen = (torch.from_numpy(np.stack(leaf)) for leaf in both)
        shorter = torch.cat([torch.zeros_like(total[:1]), total[:-1]])
        return Evidence(background, bucket(seen) * BUCKETS + bucket(shorter), seen > 0, times, total, kinds)


def bucket(seen: Tensor) -> Tensor:
    """The class of a number of times that a context was seen.

    >>> bucket(torch.tensor([0, 1, 2, 3, 6, 7, 10**6]))
    tensor([ 0,  1,  1,  2,  2,  3, 10])
    """
    return (seen + 1).double().log2().floor().long().clamp(max=BUCKETS - 1)
