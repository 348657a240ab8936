"""The n-gram baseline: beside a slow version written from the formulas, and on text whose entropy is known."""

import gzip
import json
import lzma
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.text.ngram import BUCKETS, MARGIN, NGramModel, modified_discounts

DATA = Path(os.environ.get("MLFRAMEWORK_DATA") or Path(__file__).parent.parent.parent / "shared" / "data") / "text"
VOCABULARY = 4


def rows_of(tokens, mask=None):
    """Examples of tokens `[tasks, n, length + 1]`."""
    x, y = tokens[..., :-1], tokens[..., 1:]
    return Examples(x, y, torch.ones(x.shape) if mask is None else mask)


def draw(tasks, n, length, seed=0, padded=True):
    """Random rows of a small alphabet, some of them shorter than others."""
    generator = torch.Generator().manual_seed(seed)
    # Squared, so that some tokens are frequent and long n-grams come back.
    tokens = (torch.rand(tasks, n, length + 1, generator=generator).square() * VOCABULARY).long()
    sizes = torch.randint(0 if padded else length, length + 1, (tasks, n, 1), generator=generator)
    return rows_of(tokens, (torch.arange(length) < sizes).float())


def model_of(order=3, background=None, seed=None):
    """An n-gram model with a background and with random weights, where such are asked for."""
    model = NGramModel(VOCABULARY, order=order)
    if background is not None:
        model.fit_background(*(leaf[0] for leaf in background))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.weights.parameters():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


class SlowCounts:
    """Places of all n-grams of some rows (lists of tokens), by looking at each of them."""

    def __init__(self, rows, order):
        before, occurrences = defaultdict(set), defaultdict(int)
        for i, row in enumerate(rows):
            for end in range(1, len(row)):
                for size in range(1, min(order, end + 1) + 1):
                    gram = tuple(row[end - size + 1 : end + 1])
                    if size == order:
                        occurrences[gram] += 1
                    # A beginning is a place of its own, whatever row it is of.
                    left = (i, end, "beginning") if end - size < 0 else row[end - size]
                    before[gram].add(left)
        self.counts = {gram: occurrences[gram] if len(gram) == order else len(before[gram]) for gram in before}

    def after(self, context):
        """The counts of all tokens after a context."""
        return [self.counts.get((*context, token), 0) for token in range(VOCABULARY)]


def row_lists(examples, task):
    """The rows of a task without their padding."""
    x, y, mask = (leaf[task] for leaf in examples)
    return [[int(x[i, 0]), *y[i, : int(mask[i].sum())].tolist()] for i in range(len(x)) if mask[i].sum()]


def bucket(count):
    return min(int(math.log2(count + 1)), BUCKETS - 1)


class SlowModel:
    """The formulas of `NGramModel` for one token at a time, from its weights."""

    def __init__(self, model, background, support):
        self.background, self.support, self.order = background, support, model.order
        self.taken = [[MARGIN + (k + 1 - 2 * MARGIN) * v.sigmoid().item() for k, v in enumerate(row)] for row in
                      model.weights.discounts]  # fmt: skip
        self.trust = model.weights.trust.sigmoid().tolist()
        self.discounts = [
            modified_discounts(torch.tensor([c for gram, c in background.counts.items() if len(gram) == size]))
            for size in range(1, model.order + 1)
        ]

    def smoothed(self, counts, token, discounts, below):
        """Interpolated absolute discounting."""
        if not sum(counts):
            return below
        less = sum(discounts[min(count, 3) - 1] for count in counts if count)
        kept = counts[token] - discounts[min(counts[token], 3) - 1] if counts[token] else 0
        return (kept + less * below) / sum(counts)

    def in_background(self, context, token):
        below = self.in_background(context[1:], token) if context else 1 / VOCABULARY
        return self.smoothed(self.background.after(context), token, self.discounts[len(context)], below)

    def probability(self, context, token):
        below = self.probability(context[1:], token) if context else 1 / VOCABULARY
        seen = sum(self.background.after(context))
        shorter = sum(self.support.after(context[1:])) if context else 0
        trust = self.trust[len(context)][bucket(seen) * BUCKETS + bucket(shorter)] if seen else 0
        mixed = trust * self.in_background(context, token) + (1 - trust) * below
        return self.smoothed(self.support.after(context), token, self.taken[len(context)], mixed)

    def log_probabilities(self, row):
        """Of the tokens of a row, but for the first."""
        return [
            math.log(self.probability(tuple(row[max(0, end - self.order + 1) : end]), row[end]))
            for end in range(1, len(row))
        ]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_are_those_of_the_formulas_one_token_at_a_time(order):
    background, support, query = draw(1, 30, 7, seed=0), draw(3, 5, 7, seed=1), draw(3, 4, 7, seed=2)
    model = model_of(order, background, seed=3)
    found = model.log_probabilities(
        support._replace(mask=support.mask.double()), query._replace(mask=query.mask.double())
    )
    slow_background = SlowCounts(row_lists(background, 0), order)
    for task in range(3):
        slow = SlowModel(model, slow_background, SlowCounts(row_lists(support, task), order))
        expected = [value for row in row_lists(query, task) for value in slow.log_probabilities(row)]
        np.testing.assert_allclose(found[task][query.mask[task] > 0], expected, rtol=1e-12)


@pytest.mark.parametrize("with_background", [True, False])
@pytest.mark.parametrize("with_support", [True, False])
def test_the_probabilities_of_all_tokens_sum_to_one(with_background, with_support):
    model = model_of(3, draw(1, 30, 7) if with_background else None, seed=3)
    support = draw(2, 5, 7, seed=1)
    if not with_support:
        support = support._replace(mask=torch.zeros_like(support.mask))
    contexts = draw(2, 20, 4, seed=2, padded=False)
    y = contexts.y.repeat_interleave(VOCABULARY, dim=1).clone()
    y[..., -1] = torch.arange(VOCABULARY).repeat(20)
    query = Examples(contexts.x.repeat_interleave(VOCABULARY, dim=1), y, torch.ones(y.shape, dtype=torch.float64))
    last = model.log_probabilities(support, query)[..., -1].exp()
    torch.testing.assert_close(last.unflatten(1, (20, VOCABULARY)).sum(-1), torch.ones(2, 20).double())


def test_without_any_text_all_tokens_are_alike():
    query = draw(2, 3, 5, padded=False)
    support = query._replace(mask=torch.zeros_like(query.mask))
    found = model_of(3).log_probabilities(support, query)
    torch.testing.assert_close(found, torch.full((2, 3, 5), -math.log(VOCABULARY), dtype=torch.float64))


def test_nothing_is_impossible_however_sure_the_weights():
    model = NGramModel(300, order=4)
    model.fit_background(torch.zeros(50, 8).long(), torch.zeros(50, 8).long(), torch.ones(50, 8))
    for parameter in model.weights.parameters():
        parameter.data.fill_(-1000.0)
    never = rows_of(torch.full((1, 2, 9), 299))
    for trust in (-1000.0, 1000.0):
        model.weights.trust.data.fill_(trust)
        assert model.log_probabilities(rows_of(torch.zeros(1, 4, 9).long()), never).isfinite().all()


def test_each_task_is_judged_by_its_own_support_set():
    background, support, query = draw(1, 20, 7), draw(4, 5, 7, seed=1), draw(4, 3, 7, seed=2)
    model = model_of(3, background, seed=3)
    together = model.log_probabilities(support, query)
    for part in Episode(support, query).chunks(1):
        alone = model.log_probabilities(*part)
        assert torch.equal(together[:1], alone)
        together = together[1:]


def test_padding_and_the_order_of_rows_change_nothing():
    background, support, query = draw(1, 20, 6), draw(2, 5, 6, seed=1), draw(2, 3, 6, seed=2)
    model = model_of(3, background, seed=3)

    def padded(examples):
        """The rows in another order, longer, and with a row of padding."""
        x, y = (torch.nn.functional.pad(leaf.flip(1), (0, 2, 1, 0), value=3) for leaf in examples[:2])
        return Examples(x, y, torch.nn.functional.pad(examples.mask.flip(1), (0, 2, 1, 0)))

    expected = model.log_probabilities(support, query)
    model.fit_background(*(leaf[0] for leaf in padded(background)))
    found = model.log_probabilities(padded(support), padded(query))
    assert torch.equal(found[:, 1:, :-2].flip(1), expected)
    assert not found[:, 0].any() and not found[..., -2:].any()


def test_no_token_is_given_away_by_what_follows_it_or_by_other_rows():
    background, support, query = draw(1, 20, 6), draw(2, 5, 6, seed=1), draw(2, 3, 6, seed=2, padded=False)
    model = model_of(3, background, seed=3)
    tokens = torch.cat([query.x[..., :1], query.y], dim=-1)
    changed = tokens.clone()
    changed[:, 1, 4:] = (changed[:, 1, 4:] + 1) % VOCABULARY
    before, after = (model.log_probabilities(support, rows_of(t)) for t in (tokens, changed))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert torch.equal(before[:, 1, :3], after[:, 1, :3])
    assert (before[:, 1, 3:] != after[:, 1, 3:]).any()


def test_a_text_that_begins_is_told_from_one_that_goes_on():
    boundary = VOCABULARY - 1
    model = model_of(2)
    support = rows_of(torch.tensor([[[boundary, 0, 1, 1, 1, 1]] * 4]))
    first, later = (rows_of(torch.tensor([[[before, 0]]])) for before in (boundary, 1))
    assert model.log_probabilities(support, first).exp() > 2 * model.log_probabilities(support, later).exp()


def test_a_token_that_follows_one_other_only_is_not_expected_after_any():
    """As Francisco after San (Chen & Goodman 1999, section 2.7): often said, but after one word."""
    rows = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1], [0, 2, 2, 3, 2, 0, 2, 3]])
    model = model_of(2)
    model.fit_background(rows[:, :-1], rows[:, 1:], torch.ones(2, 7))
    empty = rows_of(torch.zeros(1, 1, 2).long(), torch.zeros(1, 1, 1))
    model.weights.trust.data.fill_(1000.0)
    unseen = [model.log_probabilities(empty, rows_of(torch.tensor([[[3, token]]]))).item() for token in (1, 2)]
    assert (rows[:, 1:] == 1).sum() >= (rows[:, 1:] == 2).sum()
    assert unseen[0] < unseen[1]


def test_discounts_are_those_of_chen_and_goodman():
    counts = torch.tensor([0, 1, 2, 3, 4, 9]).repeat_interleave(torch.tensor([50, 40, 20, 10, 6, 2]))
    once = 40 / (40 + 2 * 20)
    expected = [1 - 2 * once * 20 / 40, 2 - 3 * once * 10 / 20, 3 - 4 * once * 6 / 10]
    np.testing.assert_allclose(modified_discounts(counts), expected)
    np.testing.assert_array_equal(modified_discounts(torch.tensor([1, 1, 2, 7])), [0.5, 1.0, 1.5])


def test_a_large_vocabulary_is_counted_exactly():
    tokens = torch.randint(10**6, (1, 3, 20), generator=torch.Generator().manual_seed(0))
    model = NGramModel(10**6, order=8)
    assert (model.log_probabilities(rows_of(tokens), rows_of(tokens)) > math.log(0.2)).all()
    other = model.log_probabilities(rows_of(tokens), rows_of((tokens + 1) % 10**6))
    assert (other < math.log(1e-4)).all()


def chains(count, seed):
    """Transition probabilities `[count, 4, 4]`: half of each is common to all."""
    common = torch.distributions.Dirichlet(torch.full((VOCABULARY,), 0.3, dtype=torch.float64))
    torch.manual_seed(0)
    shared = common.sample((VOCABULARY,))
    torch.manual_seed(seed)
    return (shared + common.sample((count, VOCABULARY))) / 2


def episode_of(transitions, n, length, seed):
    """Rows of each chain: half of them support."""
    torch.manual_seed(seed)
    tasks = len(transitions)
    tokens = [torch.randint(VOCABULARY, (tasks, 2 * n))]
    for _ in range(length):
        following = transitions[torch.arange(tasks)[:, None], tokens[-1]]
        tokens.append(torch.multinomial(following.flatten(0, 1), 1).view(tasks, 2 * n))
    rows = rows_of(torch.stack(tokens, dim=-1))
    return Episode(rows.rows(slice(n)), rows.rows(slice(n, None)))


def loss_of(model, episode):
    return -model.log_probabilities(*episode).mean().item()


def test_tuned_it_beats_each_part_alone_and_comes_near_the_entropy():
    training, validation, test = (episode_of(chains(100, seed), 2, 20, seed) for seed in (1, 2, 3))
    losses = {}
    for name in ("background", "support", "both"):
        model = model_of(3)
        if name != "support":
            model.fit_background(*(leaf.flatten(0, 1) for leaf in training.joined()))
        parts = [validation, test]
        if name == "background":
            parts = [e._replace(support=e.support._replace(mask=torch.zeros_like(e.support.mask))) for e in parts]
        untuned = loss_of(model, parts[0])
        model.tune(parts[0].chunks(20))
        assert loss_of(model, parts[0]) < untuned
        losses[name] = loss_of(model, parts[1])
    transitions = chains(100, 3)
    chosen = transitions[torch.arange(100)[:, None, None], test.query.x, test.query.y]
    entropy = -chosen.log().mean().item()
    assert entropy < losses["both"] < min(losses["background"], losses["support"]) - 0.02
    assert losses["both"] < entropy + 0.1


def test_tuning_knows_where_the_background_is_of_no_use():
    """Each chain's own tokens, the background another's: what is tuned must not trust it."""
    validation, test = (episode_of(chains(50, seed), 6, 20, seed) for seed in (2, 3))
    alone = model_of(2)
    alone.tune([validation])
    misled = model_of(2)
    noise = torch.randint(VOCABULARY, (500, 21), generator=torch.Generator().manual_seed(0))
    misled.fit_background(noise[:, :-1], noise[:, 1:], torch.ones(500, 20))
    misled.tune([validation])
    assert abs(loss_of(misled, test) - loss_of(alone, test)) < 0.01


def test_tuning_is_the_same_whatever_the_chunks_and_whether_gradients_are_on():
    episode = episode_of(chains(6, 1), 3, 10, 1)
    first, second = model_of(2), model_of(2)
    first.tune([episode])
    with torch.no_grad():
        second.tune(episode.chunks(2))
    assert torch.equal(first.weights.trust, second.weights.trust)


@pytest.mark.parametrize("field", ["vocabulary", "order"])
def test_what_cannot_be_counted_is_named(field):
    with pytest.raises(InvalidValue, match=f"{field}=0: must be at least 1"):
        NGramModel(**{"vocabulary": 4, "order": 2, field: 0})


@pytest.mark.skipif(not (DATA / "shakespeare_roles.json.gz").exists(), reason=f"there is no text in {DATA}")
def test_unseen_roles_take_fewer_bits_than_lzma_needs_for_them():
    with gzip.open(DATA / "shakespeare_roles.json.gz") as file:
        texts = ["\n".join(speeches).encode() for _, speeches in sorted(json.load(file).items())]
    rows = [torch.tensor(list(text[: len(text) // 65 * 65])).view(-1, 65) for text in texts]
    background = torch.cat(rows[:70])
    model = NGramModel(257)
    model.fit_background(background[:, :-1], background[:, 1:], torch.ones(len(background), 64))
    held_out = torch.stack([row[:16] for row in rows[70:] if len(row) >= 16])
    episode = Episode(rows_of(held_out[:, :8]), rows_of(held_out[:, 8:]))
    validation, test = episode.tasks(slice(8)), episode.tasks(slice(8, None))
    untuned = loss_of(model, test)
    model.tune([validation], iterations=15)
    known, unknown = (part.numpy().astype(np.uint8).tobytes() for part in (background, held_out[8:, 8:]))
    compressed = 8 * (len(lzma.compress(known + unknown)) - len(lzma.compress(known))) / len(unknown)
    assert loss_of(model, test) < untuned
    assert loss_of(model, test) / math.log(2) < compressed - 0.2
