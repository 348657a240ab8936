"""An n-gram language model of a task's support set and of all training text: the bar for learned text models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    """Rows of tokens. A token that does not count is no context of others either: a row begins anew behind it."""

    owner: Tensor  # whose text a row is [rows]
    tokens: Tensor  # the token before the first target, then the targets [rows, length + 1]
    known: Tensor  # which of them count [rows, length + 1]

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Text:
        """Rows of tasks `[tasks, n, length]`, `y` being `x` one token further; a task owns its rows."""
        known = mask.flatten(0, 1) > 0
        tokens = torch.cat([x[..., :1], y], dim=-1).flatten(0, 1)
        owner = torch.arange(len(x)).repeat_interleave(x.shape[1])
        return cls(owner, tokens.cpu(), torch.cat([known[:, :1], known], dim=1).cpu())

    @property
    def targets(self) -> Tensor:
        """The tokens to predict, `[rows, length + 1]`: all that count, but for the first of each row."""
        return self.known & (torch.arange(self.known.shape[1]) > 0)

    @property
    def first_contexts(self) -> Tensor:
        """The contexts of single tokens are the texts' owners, from 1 on: `[rows, length + 1]`."""
        return (self.owner[:, None] + 1).expand(self.tokens.shape)


class Found(NamedTuple):
    """The counts of the n-grams of one order that end in given targets."""

    times: Tensor  # of the n-gram itself [targets]
    total: Tensor  # of all n-grams with its context [targets]
    kinds: Tensor  # how many tokens have a count of one, of two, of more after the context [CLASSES, targets]


class Order:
    """The n-grams of one order that stand in some text.

    An n-gram's number is its place in `keys`, and 0 stands for none. Its key is made of its context's number among the
    n-grams of the order below (of order 1: of the text's owner) and of its last token, so that any order and vocabulary
    are exact.
    """

    def __init__(self, keys: Tensor, counts: Tensor, *, contexts: int, vocabulary: int) -> None:
        self.keys = keys  # sorted [grams]; the first, 0, is no n-gram's
        self.counts = counts  # see `places` [grams]; n-grams without are but the contexts of others
        context, classes = keys // vocabulary, counts.clamp(max=CLASSES)
        #: Sums of the counts after each context [contexts]; tokens of each class after it [CLASSES, contexts].
        self.totals = torch.bincount(context, counts, minlength=contexts).long()
        kinds = [torch.bincount(context[classes == c], minlength=contexts) for c in range(1, CLASSES + 1)]
        self.kinds = torch.stack(kinds)

    def numbers(self, keys: Tensor) -> Tensor:
        """The number of each key, 0 where there is no such n-gram."""
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, place, 0)


class Counts:
    """The n-grams of some text of at most `order` tokens, those of each of its owners by themselves."""

    def __init__(self, text: Text, *, owners: int, order: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.orders: list[Order] = []
        contexts = owners + 1
        keys, grams = self.number(text, text.first_contexts)
        for further in reversed(range(order)):
            longer_keys, longer = self.number(text, one_further(grams)) if further else (keys, torch.zeros_like(grams))
            counts = places(text, grams, longer, len(keys))
            self.orders.append(Order(keys, counts, contexts=contexts, vocabulary=vocabulary))
            contexts, keys, grams = len(keys), longer_keys, longer

    def keys(self, text: Text, contexts: Tensor) -> Tensor:
        """The key of the n-gram at each token, `[rows, length + 1]`; 0 where is none."""
        return torch.where(text.known & (contexts > 0), contexts * self.vocabulary + text.tokens, 0)

    def number(self, text: Text, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The sorted keys of the n-grams with the given contexts, and the number of that at each token."""
        found = self.keys(text, contexts)
        keys, numbers = torch.unique(F.pad(found.flatten(), (0, 1)), return_inverse=True)
        return keys, numbers[:-1].view_as(found)

    def find(self, text: Text) -> Iterator[Found]:
        """The counts of the n-grams of order 1, 2, ... that end in a text's targets."""
        contexts, targets = text.first_contexts, text.targets
        for order in self.orders:
            grams = order.numbers(self.keys(text, contexts))
            before = contexts[targets]
            yield Found(order.counts[grams[targets]], order.totals[before], order.kinds[:, before])
            contexts = one_further(grams)


def one_further(grams: Tensor) -> Tensor:
    """The number of the n-gram before each token, its context: `[rows, length + 1]`, 0 at the beginning."""
    return F.pad(grams[:, :-1], (1, 0))


def places(text: Text, grams: Tensor, longer: Tensor, size: int) -> Tensor:
    """In how many places each of `size` n-grams stands: different tokens before it, and beginnings of rows.

    These are Kneser and Ney's counts of lower orders. Where nothing is longer, every occurrence is a place. `grams` and
    `longer` are the n-grams that end at each token and those one token longer, `[rows, length + 1]`; 0 is none.
    """
    endings = longer.new_zeros(int(longer.max()) + 1)
    endings[longer] = grams * (longer > 0)
    beginnings = grams * (text.targets & (longer == 0))
    counts = torch.bincount(endings, minlength=size) + torch.bincount(beginnings.flatten(), minlength=size)
    counts[0] = 0
    return counts


def modified_discounts(counts: Tensor) -> Tensor:
    """The discounts of counts of one, two, and three or more, `[CLASSES]` (Chen & Goodman 1999, equation 26)."""
    whole = torch.arange(1, CLASSES + 1, dtype=torch.float64)
    ones, twos, threes, fours = torch.bincount(counts, minlength=5)[1:5].tolist()
    if not (ones and twos and threes and fours):
        return whole / 2
    once = ones / (ones + 2 * twos)
    raised = whole - (whole + 1) * once * whole.new_tensor([twos / ones, threes / twos, fours / threes])
    return raised.clamp(whole.new_tensor(MARGIN), whole - MARGIN)


def smoothed(discounts: Tensor, below: Tensor, times: Tensor, total: Tensor, kinds: Tensor) -> Tensor:
    """The probabilities `[targets]` by counts (see `Found`), which leave their discounts `[CLASSES]` to `below`."""
    kept = (times - discounts[times.clamp(1, CLASSES) - 1]) * (times > 0)
    given = (kept + discounts @ kinds.to(discounts.dtype) * below) / total.clamp(min=1)
    return torch.where(total > 0, given, below)


class Evidence(NamedTuple):
    """All that the weights need to know of some queries' targets, for contexts of one length."""

    background: Tensor  # probabilities in the background [targets]
    #: Place in the table of weights [targets]: how often the background saw the context, and how often the support set
    #: saw the one that is a token shorter.
    trust: Tensor
    known: Tensor  # whether the background saw the context at all [targets]
    times: Tensor  # in the support set, see `Found` [targets]
    total: Tensor  # in the support set [targets]
    kinds: Tensor  # in the support set [CLASSES, targets]


class Weights(nn.Module):
    """How a support set's n-grams are discounted and how far the background is trusted; tuned on other tasks."""

    def __init__(self, order: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.discounts = nn.Parameter(torch.zeros(order, CLASSES, dtype=torch.float64))
        self.trust = nn.Parameter(torch.zeros(order, BUCKETS * BUCKETS, dtype=torch.float64))

    def forward(self, evidence: Sequence[Evidence]) -> Tensor:
        """Logarithms of the targets' probabilities `[targets]`, by the evidence of each order."""
        whole = torch.arange(1, CLASSES + 1, dtype=torch.float64)
        probability = torch.full_like(evidence[0].background, 1 / self.vocabulary)
        for discounts, trust, seen in zip(self.discounts, self.trust, evidence, strict=True):
            trusted = trust.sigmoid()[seen.trust] * seen.known
            mixed = trusted * seen.background + (1 - trusted) * probability
            taken = discounts.sigmoid() * (whole - 2 * MARGIN) + MARGIN
            probability = smoothed(taken, mixed, seen.times, seen.total, seen.kinds)
        return probability.log()


class NGramModel:
    """An n-gram model of each task's support set that falls back on one of all training text.

    After a context h of k tokens, the support set's discounted counts keep what is left for

        trust * background(token | h) + (1 - trust) * adapted(token | the last k - 1 tokens of h),

    and so on down to the uniform distribution. Both models are Kneser-Ney's. The background's discounts follow from
    its counts; where the counts of counts give none, as in a small text, a discount is half the count. The support
    set's, and `trust`, which depends on k, on how often the background saw h and how often the support set saw its last
    k - 1 tokens, are tuned on other tasks (maximum likelihood by L-BFGS). Text before a row's first token is not seen,
    as it is not by the learned models.

    Reference: Wood & Teh, A hierarchical nonparametric Bayesian approach to statistical language model domain
        adaptation, 2009 (AISTATS, PMLR 5:607-614), section 4: the same two ways to fall back. Deviations: absolute
        discounts in the place of Pitman-Yor processes (one seat per place, concentration 0), and weights by how often
        contexts were seen (Jelinek & Mercer 1980). The background is interpolated modified Kneser-Ney smoothing: Chen &
        Goodman, An empirical study of smoothing techniques for language modeling, 1999 (Computer Speech and Language
        13:359-394), equations 18-26.

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
        self.weights = Weights(order, vocabulary)
        padding = torch.zeros(1, 1, dtype=torch.int64)
        self.fit_background(padding, padding, padding)

    def fit_background(self, rows: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Counts all training text anew.

        Args:
            rows: tokens `[rows, length]`; the longer the rows, the fewer contexts are cut.
            targets: the tokens that follow, `[rows, length]`: the same rows one token further.
            mask: 1 where a target counts, `[rows, length]`.
        """
        text = Text.of(rows[None], targets[None], mask[None])
        self.background = Counts(text, owners=1, order=self.order, vocabulary=self.vocabulary)
        self.discounts = [modified_discounts(order.counts) for order in self.background.orders]

    def tune(self, episodes: Iterable[Episode], *, iterations: int = 40) -> None:
        """Chooses discounts and trust by the likelihood of queries, given their support sets.

        Args:
            episodes: tasks that are not in the background, or it is trusted too much: validation tasks.
            iterations: of L-BFGS, each on all the tasks.
        """
        found = [self.evidence(episode.support, episode.query) for episode in episodes]
        by_order = [zip(*parts, strict=True) for parts in zip(*found, strict=True)]
        evidence = [Evidence(*(torch.cat(leaves, dim=-1) for leaves in parts)) for parts in by_order]
        self.weights = Weights(self.order, self.vocabulary)
        parameters = list(self.weights.parameters())
        optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            surprise = -self.weights(evidence).sum()
            prior = sum((p.square().sum() for p in parameters), torch.zeros(())) / (2 * PRIOR_SCALE**2)
            value = (surprise + prior) / len(evidence[0].total)
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

    def evidence(self, support: Examples, query: Examples) -> list[Evidence]:
        """The evidence of each order, by the n-grams that end in queries' targets."""
        text = Text.of(*query)
        shared = text._replace(owner=torch.zeros_like(text.owner))
        counts = Counts(Text.of(*support), owners=len(support.mask), order=self.order, vocabulary=self.vocabulary)
        below = torch.full((int(text.targets.sum()),), 1 / self.vocabulary, dtype=torch.float64)
        shorter, evidence = torch.zeros_like(below), []
        orders = zip(counts.find(text), self.background.find(shared), self.discounts, strict=True)
        for found, in_background, discounts in orders:
            below = smoothed(discounts, below, *in_background)
            trust = bucket(in_background.total) * BUCKETS + bucket(shorter)
            evidence.append(Evidence(below, trust, in_background.total > 0, *found))
            shorter = found.total
        return evidence


def bucket(seen: Tensor) -> Tensor:
    """The class of a number of times that a context was seen.

    >>> bucket(torch.tensor([0, 1, 2, 3, 6, 7, 10**6]))
    tensor([ 0,  1,  1,  2,  2,  3, 10])
    """
    return (seen + 1).double().log2().floor().long().clamp(max=BUCKETS - 1)
