"""Tasks of text: windows of tokens, nothing shared by support and query or by splits, bits per character."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from mlframework.errors import InvalidValue, UserError
from mlframework.tasks import Bytes, PretrainedTokenizer, Source, TextLanguages, TextRoles, TextTasks
from mlframework.tasks.text import tokens as tokens_module
from mlframework.tasks.text.text_data import by_speaker
from mlframework.tasks.text.text_lists import TextLists, language_of
from mlframework.tasks.text.tokens import Tokens
from mlframework.testing import check_task_distribution

DATA = Path(os.environ.get("MLFRAMEWORK_DATA") or Path(__file__).parents[2] / "shared" / "data")
B = Bytes.boundary


class Given(TextTasks):
    """Texts at hand, the same in every split."""

    def __init__(self, *sources, running=False, length=4, k_shot=1, k_query=1):
        super().__init__(k_shot=k_shot, k_query=k_query, length=length, running=running)
        self.given = [Source(f"source {number}", texts) for number, texts in enumerate(sources)]

    def load(self, split):
        return self.given


def draw(task, num_tasks=3, seed=0):
    return task.sample(num_tasks, "train", torch.Generator().manual_seed(seed))


def rows_of(examples, task=0):
    """Rows as lists of what goes in and what comes out, padding left out."""
    x, y, mask = (leaf[task] for leaf in examples)
    return [(a[m > 0].tolist(), b[m > 0].tolist()) for a, b, m in zip(x, y, mask, strict=True)]


def test_a_text_of_a_list_stands_between_boundaries_and_goes_on_in_a_row_of_its_own():
    rows = rows_of(Given().encode(["ab", "abcdef"]))
    a, b, c, d, e, f = b"abcdef"
    assert rows == [([B, a, b], [a, b, B]), ([B, a, b, c], [a, b, c, d]), ([d, e, f], [e, f, B])]


def test_running_text_is_one_stream_of_full_rows_whose_end_overlaps_only_for_a_users_examples():
    task = Given(["abc", "defgh"], running=True)
    a, b, c, d, e, f, g, h = b"abcdefgh"
    first, second = ([B, a, b, c], [a, b, c, B]), ([B, d, e, f], [d, e, f, g])
    assert rows_of(task.encode(["abc", "defgh"])) == [first, second, ([e, f, g, h], [f, g, h, B])]
    assert sorted(rows_of(draw(task, 1).joined())) == sorted([first, second])
    assert not task.spec.ragged


def test_a_text_shorter_than_a_row_is_still_one():
    examples = Given(running=True).encode(["a"])
    assert rows_of(examples) == [([B, 97], [97, B])]
    assert examples.mask.all()  # a task that is never ragged is trained on every token, padding included


def test_rows_of_a_task_are_different_rows_of_one_source():
    task = Given(["ab", "cd", "ef"], ["gh", "ij", "kl"], k_shot=2, k_query=1)
    for number in range(3):
        texts = {task.decode(row.tolist()) for row in draw(task).joined().y[number]}
        assert texts in ({"ab", "cd", "ef"}, {"gh", "ij", "kl"})


def slow_rows(tokens, texts, length, running, overlap):
    """The rows of texts, one token after another."""
    encoded = [[*tokens.encode(text), B] for text in texts if text]
    found = []
    for text in [list(chain.from_iterable(encoded))] if running else encoded:
        left = [B, *text]
        while len(left) > length or (len(left) > 1 and not running):
            found.append(left[: length + 1])
            left = left[length:]
        if running and overlap and len(left) > 1:
            found.append([B, *text][-length - 1 :])
    return found


class Characters(Bytes):
    """Bytes, encoded text by text as any other tokens are."""

    flat = Tokens.flat


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("tokens", [Bytes(), Characters()])
def test_rows_are_those_of_a_slow_version_and_the_first_with_their_inputs_stay(running, tokens):
    chance = random.Random(0)
    for _ in range(150):
        sizes = [chance.choice([0, 1, 2, 3, 5, 9, 20]) for _ in range(chance.randint(1, 5))]
        texts = ["".join(chance.choice("abé") for _ in range(size)) for size in sizes] + ["a"]
        task = Given(texts, running=running, length=chance.randint(1, 7))
        task.tokens = tokens
        for overlap in (True, False):
            found = task.windows([text for text in texts if text], overlap=overlap)
            rows = [row[: count + 1].tolist() for row, count in zip(found.tokens, found.lengths, strict=True)]
            assert rows == slow_rows(tokens, texts, task.length, running, overlap)
        kept = {}
        for row in slow_rows(tokens, texts if running else dict.fromkeys(texts), task.length, running, False):
            kept.setdefault(tuple(row[:-1]), row)
        found = task.distinct_windows(Source("one", texts))
        rows = [row[: count + 1].tolist() for row, count in zip(found.tokens, found.lengths, strict=True)]
        assert rows == list(kept.values())


def test_a_list_forgets_what_it_holds_twice():
    with pytest.raises(UserError, match="no source of the train split has 2 \\+ 1 rows of 4 tokens"):
        draw(Given(["ab", "cd", "ab"], k_shot=2))
    # The same inputs with another ending would tell the answer of one by the other.
    with pytest.raises(UserError, match="no source"):
        draw(Given(["abcd", "abce"], k_shot=3))


def test_sources_with_too_few_rows_are_left_out():
    task = Given(["ab"], ["cd", "ef"])
    assert [source.name for source in task.sources("train")] == ["source 1"]


def test_decoding_goes_from_one_boundary_to_the_next():
    task = Given()
    assert task.decode([B, *b"ab", B, *b"cd"]) == "ab"
    assert task.decode([*b"ab"]) == "ab"
    assert task.decode([B, *"é".encode()[:1]]) == "�"


@pytest.mark.parametrize("text", ["plain", "é", "日本語", "🙂"])
def test_bytes_count_characters_of_any_script(text):
    tokens = Bytes()
    assert tokens.decode(tokens.encode(text)) == text
    assert tokens.characters[tokens.encode(text)].sum() == len(text)


def test_bits_per_character_are_all_bits_by_all_characters():
    task = Given(length=8)
    y, mask = task.encode(["日本", "ab"])[1:]  # 2 + 1 and 2 + 1 characters, 7 and 3 tokens
    prediction = torch.randn(*y.shape, task.spec.out_features, generator=torch.Generator().manual_seed(0))
    nats = 0.0
    for row in range(2):
        for position in range(int(mask[0, row].sum())):
            nats -= float(prediction[0, row, position].log_softmax(-1)[y[0, row, position]])
    scores = task.scores(prediction, y, mask)
    torch.testing.assert_close(scores["bits_per_character"], torch.tensor([nats / math.log(2) / 6]))
    torch.testing.assert_close(scores["loss"], torch.tensor([nats / 10]))


def test_nothing_to_adapt_to_is_an_error():
    with pytest.raises(UserError, match="no text to adapt to"):
        Given().encode(["", ""])


@pytest.mark.parametrize("field", ["k_shot", "k_query", "length"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(InvalidValue, match=f"{field}=0: must be a whole number of at least 1"):
        Given(**{field: 0})


# Lists.


@pytest.fixture(scope="module")
def lists():
    return TextLists(k_shot=10, k_query=10, length=32)


def test_hundreds_of_lists_and_no_language_in_two_splits(lists):
    names = {split: [source.name for source in lists.sources(split)] for split in ("train", "validation", "test")}
    assert len(names["train"]) > 300 and min(len(names["validation"]), len(names["test"])) > 100
    languages = [{language_of(name) for name in of_split} for of_split in names.values()]
    assert all(len(some) >= 8 for some in languages)
    assert not (languages[0] & languages[1] or languages[0] & languages[2] or languages[1] & languages[2])


def test_no_text_of_one_split_stands_in_another(lists):
    texts = [{t for s in lists.sources(split) for t in s.texts} for split in ("train", "validation", "test")]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_lists_are_in_their_own_language(lists):
    """What faker lacks in a language it says in English: such lists are not there."""
    cyrillic = next(source for source in lists.sources("test") if source.name == "ru_RU/job")
    assert sum("а" <= c <= "я" for text in cyrillic.texts for c in text) > 1000
    assert "is_IS/job" not in {source.name for source in lists.sources("test")}


def test_no_list_is_english_for_want_of_a_better(lists):
    """A provider may be a locale's own, and say what all say: `pl_PL` has prices, and no names of currencies."""
    names = {source.name for split in ("train", "validation", "test") for source in lists.sources(split)}
    generic = {"pl_PL/currency_name", "cs_CZ/color_name", "ja_JP/street_name", "de_LU/name", "fil_PH/city"}
    own = {
        "de_DE/currency_name",
        "fr_FR/color_name",
        "ja_JP/city",
        "de_LU/last_name",
        "fil_PH/company",
        "en_US/company",
    }
    assert not names & generic and own <= names


def test_lists_are_the_same_in_every_process():
    """The cities of `it_IT` come from a set, whose order Python draws anew for each process."""
    code = "from mlframework.tasks.text.text_lists import lists_of; print(list(lists_of('it_IT')))"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("0", "1")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert first == second and b"it_IT/city" in first


def test_lists_keep_the_contract(lists):
    check_task_distribution(lists)


# The data folder.


@pytest.fixture
def needs_data():
    if not (DATA / "text").is_dir():
        pytest.skip(f"there is no folder text in {DATA} (set MLFRAMEWORK_DATA)")


#: Codes of one language by ISO 639-3: the dialects of Huastec, the written forms of Norwegian, the dialects of Romani.
ONE_LANGUAGE = ({"hus", "hva", "hsf"}, {"nob", "nno"}, {"rmn", "rmy"})


@pytest.mark.usefixtures("needs_data")
@pytest.mark.parametrize("script", ["latin", "all"])
def test_languages_keep_the_contract_and_variants_stay_together(script):
    task = TextLanguages(k_shot=8, k_query=8, length=64, script=script, data_dir=DATA)
    check_task_distribution(task)
    seen = [{s.name.partition("_")[0] for s in task.sources(split)} for split in ("train", "validation", "test")]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    for codes in ONE_LANGUAGE:
        assert sum(bool(codes & some) for some in seen) == 1, codes
    assert sum(map(len, seen)) > (300 if script == "all" else 250)


@pytest.mark.usefixtures("needs_data")
def test_roles_keep_the_contract():
    task = TextRoles(k_shot=8, k_query=8, length=64, data_dir=DATA)
    check_task_distribution(task)
    assert sum(len(task.sources(split)) for split in ("train", "validation", "test")) > 85


#: Headings of one person, by the plays: 3 Henry VI, Richard III and Coriolanus rename them.
PERSONS = (
    {"RICHARD", "GLOUCESTER", "KING RICHARD III"},
    {"EDWARD", "KING EDWARD IV"},
    {"LADY GREY", "QUEEN ELIZABETH"},
    {"MARCIUS", "CORIOLANUS"},
    {"First Citizen", "Second Citizen", "Third Citizen"},
    {"First Murderer", "Second Murderer"},
)
#: Words that names in two splits share though the persons differ.
SHARED = {
    *("king", "queen", "duke", "lady"),  # titles
    "vincentio",  # a duke of Vienna, a merchant of Pisa
    "edward",  # a prince (two of them) and a king
    "capulet",  # husband and wife
}


@pytest.fixture(scope="module")
def speeches():
    with gzip.open(DATA / "text" / "shakespeare_roles.json.gz") as file:
        return json.load(file)


def splits_of_speeches():
    """The splits in which each speech of at least 100 characters stands."""
    found = {}
    for split in ("train", "validation", "test"):
        for source in TextRoles(k_shot=1, k_query=1, length=64, data_dir=DATA).load(split):
            for speech in source.texts:
                if len(speech) > 100:
                    found.setdefault(speech, set()).add(split)
    return found


@pytest.mark.usefixtures("needs_data")
def test_no_person_of_shakespeares_speaks_in_two_splits(speeches):
    splits = splits_of_speeches()
    for person in PERSONS:
        long = [speech for role in person for speech in speeches[role] if len(speech) > 100]
        assert len({frozenset(splits[speech]) for speech in long}) == 1, person


@pytest.mark.usefixtures("needs_data")
def test_joining_roles_loses_and_adds_no_speech(speeches):
    joined, apart = by_speaker(speeches).values(), speeches.values()
    assert sorted(s for texts in joined for s in texts) == sorted(s for texts in apart for s in texts)


@pytest.mark.usefixtures("needs_data")
def test_names_in_two_splits_share_only_reviewed_words():
    task = TextRoles(k_shot=1, k_query=1, length=64, data_dir=DATA)
    words = [
        {word for source in task.load(split) for word in re.findall("[a-z]+", source.name.lower())}
        for split in ("train", "validation", "test")
    ]
    shared = (words[0] & words[1]) | (words[0] & words[2]) | (words[1] & words[2])
    assert shared <= SHARED


def test_a_missing_file_says_where_to_put_it_and_what_it_holds(tmp_path):
    task = TextRoles(k_shot=8, k_query=8, length=64, data_dir=tmp_path)
    with pytest.raises(UserError, match=r"text/shakespeare_roles.json.gz: is not there: put it there .*\{role: "):
        draw(task)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"no gzip", id="no gzip"),
        pytest.param(gzip.compress(b"no json"), id="no json"),
        pytest.param(gzip.compress(b"[1]"), id="no roles"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "shakespeare_roles.json.gz").write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"roles.json.gz: (cannot be read as gzip|damaged \(|must hold)",
    ):
        draw(TextRoles(k_shot=8, k_query=8, length=64, data_dir=tmp_path))


# Tokenizers.


def test_a_pretrained_tokenizer_makes_the_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = PretrainedTokenizer(tmp_path / "tokenizer.json")
    assert (tokens.vocabulary, tokens.boundary) == (4, 3)
    assert tokens.encode("to be or") == [0, 1, 2]
    assert tokens.characters.tolist() == [3, 3, 2, 1]  # each behind a space


TEXTS = ("the quick brown fox", "déjà vu", "日本語のテキスト", "🙂 и русский текст")


def trained(tokenizers, kind):
    """A tokenizer so small that it cuts characters into bytes, where it has them."""
    parts = {
        "ByteLevel": (tokenizers.models.BPE(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "Metaspace": (tokenizers.models.BPE(), tokenizers.pre_tokenizers.Metaspace()),
        "WordPiece": (tokenizers.models.WordPiece(unk_token="?"), tokenizers.pre_tokenizers.Whitespace()),
    }
    made = tokenizers.Tokenizer(parts[kind][0])
    made.pre_tokenizer, made.decoder = parts[kind][1], getattr(tokenizers.decoders, kind)()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if kind == "ByteLevel" else []
    trainer = {"WordPiece": tokenizers.trainers.WordPieceTrainer}.get(kind, tokenizers.trainers.BpeTrainer)
    special = ["?"] if kind == "WordPiece" else []
    settings = {"vocab_size": 300, "initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    made.train_from_iterator(TEXTS, trainer(**settings))
    return made


@pytest.mark.parametrize(("kind", "first"), [("ByteLevel", 0), ("Metaspace", 1), ("WordPiece", 1)])
def test_tokens_of_any_tokenizer_count_the_characters_of_a_text(tmp_path, kind, first):
    """`first`: the space before a text's first word, which is counted though it is not there."""
    trained(pytest.importorskip("tokenizers"), kind).save(str(tmp_path / "tokenizer.json"))
    tokens = PretrainedTokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        encoded = tokens.encode(text)
        assert tokens.decode(encoded) == text
        assert tokens.characters[encoded].sum() == len(text) + first


def test_bytes_that_a_tokenizer_falls_back_to_count_the_characters_of_a_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    model = tokenizers.models.BPE({name: number for number, name in enumerate(names)}, [], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = PretrainedTokenizer(tmp_path / "tokenizer.json")
    for text in ("ab", "a日本b", "é🙂"):
        encoded = tokens.encode(text)
        assert tokens.decode(encoded) == text and tokens.characters[encoded].sum() == len(text)


def test_a_tokenizer_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        PretrainedTokenizer(tmp_path / "tokenizer.json")


def test_a_long_text_is_tokenized_once_and_read_from_the_cache_then(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    trained(tokenizers, "ByteLevel").save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "cache"))
    texts = ["to be or not to be", "that is the question"]
    expected = PretrainedTokenizer(tmp_path / "tokenizer.json").stream(texts)
    monkeypatch.setattr(tokens_module, "LONG", 10)
    first = PretrainedTokenizer(tmp_path / "tokenizer.json").stream(texts)
    again = PretrainedTokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(again, "encode", None)  # it is not called any more
    for found in (first, again.stream(texts)):
        assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    monkeypatch.undo()
    other = PretrainedTokenizer(tmp_path / "tokenizer.json").stream([texts[1], texts[0]])
    assert not all((one == two).all() for one, two in zip(other, expected, strict=True))


def test_a_subclass_of_the_tokenizer_does_not_get_the_tokens_of_another(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    trained(tokenizers, "ByteLevel").save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens_module, "LONG", 10)

    class First(PretrainedTokenizer):
        def encode(self, text):
            return super().encode(text)[:1]

    texts = ["to be or not to be", "that is the question"]
    assert len(PretrainedTokenizer(tmp_path / "tokenizer.json").stream(texts)[0]) > 5
    assert len(First(tmp_path / "tokenizer.json").stream(texts)[0]) == 5
