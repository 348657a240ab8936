"""Tokens: a text as numbers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlframework.errors import InvalidValue, UserError
from mlframework.files import KeepsArguments
from mlframework.reading import MOST_RECORD, check_file
from mlframework.screen import stage
from mlframework.tasks.data_folder import Arrays, cached, missing

__all__ = ["Bytes", "PretrainedTokenizer", "Tokens"]


#: Texts of so many characters are tokenized once, and then read from the cache.
LONG = 1_000_000


class Tokens(KeepsArguments, ABC):
    """A way to write any text as numbers."""

    vocabulary: int  # how many tokens there are, `boundary` included
    boundary: int  # the token before and after every text
    characters: Tensor  # how many characters each token stands for [vocabulary]; the end of a text counts as one

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without boundaries."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens without boundaries; invalid ones become the replacement character."""

    def flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of texts, one text after another, and how many each text has `[texts]`."""
        encoded = [self.encode(text) for text in texts]
        lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        return np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum())), lengths

    def stream(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of texts with a boundary before the first and behind each, and the boundaries' places."""
        tokens, lengths = self.flat(texts)
        places = np.concatenate([[0], (lengths + 1).cumsum()])
        small = self.vocabulary <= np.iinfo(np.int16).max  # rows of a large text take half the memory
        found = np.full(places[-1] + 1, self.boundary, dtype=np.int16 if small else np.int32)
        inside = np.ones(len(found), dtype=bool)
        inside[places] = False
        found[inside] = tokens
        return found, places


class Bytes(Tokens):
    """The bytes of UTF-8: 256 tokens for any script, and the boundary.

    >>> Bytes().encode("é"), Bytes().decode([195, 169, 255])
    ([195, 169], 'é\ufffd')
    """

    vocabulary, boundary = 257, 256

    def __init__(self) -> None:
        # Every byte that does not go on with a character, 10xxxxxx, starts one.
        self.characters = torch.tensor([float(byte & 0b1100_0000 != 0b1000_0000) for byte in range(256)] + [1.0])

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [text.encode("utf-8", errors="replace") for text in texts]
        lengths = np.array([len(text) for text in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), dtype=np.uint8), lengths


class PretrainedTokenizer(Tokens):
    """The tokenizer of a `tokenizer.json` of Hugging Face's `tokenizers` at a path, and a boundary after its tokens.

    A token's characters are counted in the middle of a text. If a tokenizer puts a space before every word, the first
    word of a text is thus counted with a space that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError("task.tokens: needs `pip install tokenizers`; the default, Bytes, needs nothing") from error
        if not Path(path).is_file():
            raise InvalidValue("path", path, missing(Path(path), "file", "a tokenizer.json is expected"))
        check_file(Path(path), most=MOST_RECORD)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise InvalidValue("path", path, f"cannot be read as a tokenizer.json ({error})") from error
        self.boundary = self.tokenizer.get_vocab_size()
        self.vocabulary = self.boundary + 1
        self.characters = torch.tensor([*characters_added(self.tokenizer), 1.0])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of texts; those of long ones are kept in the cache, for tokenizing takes longer than reading."""
        if sum(map(len, texts)) < LONG or type(self) is not PretrainedTokenizer:  # a subclass may encode otherwise
            return super().flat(texts)
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        for text in texts:
            digest.update(f"\n{len(text)}:".encode() + text.encode("utf-8", errors="replace"))
        arrays = cached("tokens", digest.hexdigest(), lambda: self.tokenized(texts), source=__file__)
        return arrays["tokens"], arrays["lengths"]

    def tokenized(self, texts: Sequence[str]) -> Arrays:
        """The tokens of all texts, one after another, and how many each has; the screen tells how far they are."""
        found = []
        with stage("tokenizing texts", len(texts)) as at:
            for text in texts:
                found.append(np.array(self.encode(text), dtype=np.int32))
                at.done += 1
        return {"tokens": np.concatenate(found), "lengths": np.array([len(each) for each in found])}


#: Letters of GPT-2's alphabet, `ByteLevel`, for the bytes 10xxxxxx, which continue a character.
GOES_ON = frozenset(map(chr, (*range(0xA1, 0xAD), *range(0xAE, 0xC0), *range(0x122, 0x144))))


def characters_added(tokenizer: Any) -> list[float]:
    """How many characters each token of a `tokenizers.Tokenizer` adds behind another `[vocabulary]`.

    If several tokens write the bytes of one character, the token with its first byte counts it.
    """
    names = [tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size())]
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    if "ByteLevel" in decoder:
        return [float(sum(letter not in GOES_ON for letter in name)) for name in names]
    before = next((token for token in range(len(names)) if tokenizer.decode([token]).isalnum()), 0)
    length = len(tokenizer.decode([before]))
    added = [float(len(tokenizer.decode([before, token])) - length) for token in range(len(names))]
    if "ByteFallback" in decoder:
        single = [re.fullmatch("<0x([0-9A-F]{2})>", name) for name in names]
        starts = [found and float(int(found[1], 16) & 0b1100_0000 != 0b1000_0000) for found in single]
        return [count if start is None else start for count, start in zip(added, starts, strict=True)]
    return added
