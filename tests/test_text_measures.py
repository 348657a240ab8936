"""What generated texts are worth."""

import gzip
import json
import os
from collections import Counter
from difflib import SequenceMatcher
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.feature_extraction.text import CountVectorizer

from mlframework.errors import InvalidValue
from mlframework.text.measures import TaskFit, copied_ngrams, copied_share, distinct_n, distinct_pieces, ngram_distance

DATA = Path(os.environ.get("MLFRAMEWORK_DATA") or Path(__file__).parent.parent.parent / "shared" / "data") / "text"
needs_data = pytest.mark.skipif(not (DATA / "udhr_languages.json.gz").exists(), reason=f"there is no text in {DATA}")

POEM = ["O Rose thou art sick.", "The invisible worm,", "That flies in the night", "In the howling storm:"]
OTHER = ["Has found out thy bed", "Of crimson joy:", "And his dark secret love", "Does thy life destroy."]


def words(letters, count, seed):
    """Words of random letters."""
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(letters), generator.integers(4, 9))) for _ in range(count)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_distance_is_that_of_scipy_on_the_counts_of_scikit_learn(n):
    vectoriser = CountVectorizer(analyzer="char", ngram_range=(n, n), lowercase=False)
    marked = [f"\x02{text}\x03" for text in POEM + OTHER]
    counts = vectoriser.fit_transform(marked).toarray()
    expected = jensenshannon(counts[: len(POEM)].sum(0), counts[len(POEM) :].sum(0), base=2)
    assert ngram_distance(POEM, OTHER, n) == pytest.approx(expected, abs=1e-12)
    assert ngram_distance(OTHER, POEM, n) == pytest.approx(expected, abs=1e-12)


def test_the_distance_keeps_the_triangle_inequality():
    generator = np.random.default_rng(0)
    for seed in range(20):
        a, b, c = (words("abcd"[: generator.integers(1, 5)], 5, 3 * seed + i) for i in range(3))
        assert ngram_distance(a, c, 2) <= ngram_distance(a, b, 2) + ngram_distance(b, c, 2) + 1e-12


def test_the_distance_of_what_shares_half_is_that_of_the_closed_form():
    # One in two n-grams is common to both: half the divergence of what has nothing in common.
    assert ngram_distance(["ab", "cd"], ["ab", "xy"], 4) == pytest.approx(sqrt(1 / 2))


def test_what_holds_no_ngram_is_as_far_as_can_be():
    assert ngram_distance([], POEM, 2) == ngram_distance(POEM, ["a"], 4) == ngram_distance([], [], 1) == 1


def test_order_repetition_and_case_of_texts_are_read_as_they_are():
    assert ngram_distance(POEM, POEM[::-1] * 3, 3) == 0
    assert ngram_distance(["abc"], ["ABC"], 1) > 0.5


def test_texts_begin_and_end_and_no_ngram_spans_two_of_them():
    assert ngram_distance(["ab", "ba"], ["abba"], 2) > 0
    assert ngram_distance(["ab"], ["ba"], 1) == 0 < ngram_distance(["ab"], ["ba"], 2)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_distinct_n_counts_what_a_slow_loop_counts(n):
    seen = []
    for text in POEM:
        marked = "\x02" + text + "\x03"
        for start in range(len(marked)):
            if len(marked[start:]) >= n:
                seen.append(marked[start:][:n])
    assert distinct_n(POEM, n) == len(Counter(seen)) / len(seen)


def test_distinct_n_falls_as_texts_repeat_themselves():
    assert distinct_n(POEM, 3) == pytest.approx(4 * distinct_n(POEM * 4, 3))
    assert distinct_n([], 2) == 0


@pytest.mark.parametrize(
    ("sample", "copied"),
    [
        ("The invisible worm,", True),
        ("invisible worm", True),
        ("  THE NIGHT ", True),
        ("visible worm", False),  # part of a word
        ("sick. The", False),  # across two texts
        ("t.e", False),  # no pattern
        ("", False),
        (" ", False),
        ("sick.", True),
    ],
)
def test_a_sample_is_copied_where_it_stands_word_for_word(sample, copied):
    assert copied_share([sample], POEM) == copied
    assert copied_share([sample, "never said"], POEM) == copied / 2


def test_a_word_in_a_script_without_case_or_spaces_is_found():
    assert copied_share(["さくら", "さく", "محمد"], ["さくら", "محمد علي"]) == pytest.approx(2 / 3)


def test_nothing_is_copied_of_nothing():
    assert copied_share([], POEM) == copied_share(POEM, []) == copied_ngrams([], POEM) == copied_ngrams(POEM, []) == 0


def test_copied_ngrams_are_those_that_the_longest_match_covers():
    sample, source = "and then the invisible worm crawls", "The invisible worm,"
    match = SequenceMatcher(None, sample, source, autojunk=False).find_longest_match()
    assert match.size == len("he invisible worm")
    assert copied_ngrams([sample], [source], 10) == (match.size - 9) / (len(sample) - 9)
    assert copied_ngrams(POEM, POEM, 10) == 1
    assert copied_ngrams(["short"], POEM, 10) == 0


SOURCES = {"vowels": words("aeiouy", 60, 0), "front": words("abcdef", 60, 1), "back": words("tuvwxy", 60, 2)}


class TestTaskFit:
    def test_real_text_is_recognised_and_noise_is_not(self):
        fit = TaskFit(SOURCES, length=64)
        assert fit.score(fit.held_out)["task_fit"].mean() > 0.8
        noise = words("abcdefiotuvwxy", 300, 3)
        recognised = fit.score(dict.fromkeys(SOURCES, noise))
        # The same texts are taken once for each source's: exactly one of them is right.
        assert recognised["task_fit"].sum() == pytest.approx(1)
        assert recognised["task_fit_rank"].mean() == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)

    def test_samples_of_another_source_are_the_others(self):
        fit = TaskFit(SOURCES, length=64)
        swapped = fit.score({"front": words("tuvwxy", 50, 5), "back": words("abcdef", 50, 6)})
        assert (swapped["task_fit"] < 0.1).all() and (swapped["task_fit_rank"] < 0.6).all()
        own = fit.score({"back": words("tuvwxy", 50, 5), "front": words("abcdef", 50, 6)})
        assert (own["task_fit"] > 0.8).all() and (own["task_fit_rank"] >= own["task_fit"]).all()

    def test_what_is_held_out_is_not_trained_on(self):
        fit = TaskFit(SOURCES, length=64)
        for name, texts in SOURCES.items():
            assert sorted(fit.train[name] + fit.held_out[name]) == sorted(texts)
            assert len(fit.held_out[name]) == 12

    @pytest.mark.parametrize("count", [2, 3])
    def test_two_pieces_are_enough_to_train_on_and_to_hold_out(self, count):
        fit = TaskFit({"one": list("abc")[:count], "two": list("def")[:count]}, length=64)
        assert all(len(fit.train[name]) == count - 1 and len(fit.held_out[name]) == 1 for name in ("one", "two"))

    def test_a_text_said_twice_cannot_be_trained_on_and_held_out(self):
        fit = TaskFit({name: texts * 2 for name, texts in SOURCES.items()}, length=64)
        for name in SOURCES:
            assert not set(fit.train[name]) & set(fit.held_out[name])

    def test_labels_that_mean_nothing_are_recognised_by_chance_only(self):
        generator = np.random.default_rng(0)
        shuffled = words("abcdefgh", 2000, 7)
        generator.shuffle(shuffled)
        fit = TaskFit({f"source {i}": shuffled[i::4] for i in range(4)}, length=64)
        assert fit.score(fit.held_out)["task_fit"].mean() == pytest.approx(1 / 4, abs=0.08)

    def test_a_source_with_most_text_is_not_favoured(self):
        fit = TaskFit({"much": words("abcdef", 2000, 0), "little": words("abcdef", 20, 1)}, length=64)
        alike = fit.score({"much": ["q"], "little": ["q"]})
        # What was never seen could be either's, so it is neither's.
        assert alike["task_fit"].tolist() == [0, 0] and alike["task_fit_rank"].tolist() == [0.5, 0.5]

    def test_the_score_is_the_same_whatever_was_drawn_before(self):
        torch.manual_seed(1)
        first = TaskFit(SOURCES, length=64)
        torch.manual_seed(2)
        np.random.seed(5)
        second = TaskFit(SOURCES, length=64)
        scores = (first.score(first.held_out), second.score(second.held_out))
        assert all(torch.equal(scores[0][name], scores[1][name]) for name in ("task_fit", "task_fit_rank"))

    def test_long_texts_are_cut_into_pieces(self):
        assert distinct_pieces(["abcdefghij" * 2 + "other", "rest"], 10) == ["abcdefghij", "other", "rest"]
        assert distinct_pieces(["short", "klmno" * 5 + "long" + "rest"], 10) == ["short", "klmnoklmno", "klmnolongr"]

    @needs_data
    def test_languages_are_recognised_by_sixty_four_characters(self):
        with gzip.open(DATA / "udhr_languages.json.gz") as file:
            text = json.load(file)["text"]
        codes = ["spa", "fra", "fin", "hun", "swh", "vie", "ell_monotonic", "rus", "hin", "jpn"]
        fit = TaskFit({code: [text[code]] for code in codes}, length=64)
        assert fit.score(fit.held_out)["task_fit"].mean() > 0.97


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"one": ["a", "b"]}, "must be of at least two sources"),
        ({"one": ["a", "b"], "two": ["a", "a"]}, "texts=two: must have two different texts"),
    ],
)
def test_sources_that_cannot_be_told_apart_are_refused_in_one_line(texts, message):
    with pytest.raises(InvalidValue, match=message):
        TaskFit(texts, length=5)


def test_ngrams_of_no_characters_are_refused_in_one_line():
    with pytest.raises(InvalidValue, match="n=0: must be at least 1"):
        distinct_n(["abc"], 0)
