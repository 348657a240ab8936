"""Tasks of text: a task is a source, its examples are rows of its text, and the next token is predicted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec, masked_mean
from mlframework.errors import UserError
from mlframework.tasks.few_shot import check_at_least, distinct
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text.tokens import Bytes, Tokens

__all__ = ["Rows", "Source", "TextTasks", "as_text"]


class Source(NamedTuple):
    """One task: an author, a speaker, a language, a list."""

    name: str  # for messages and figures
    texts: Sequence[str]  # strings of a list, or speeches, paragraphs, lines in their order


class Rows(NamedTuple):
    """The rows of all sources of a split."""

    windows: Tensor  # tokens [rows, length + 1]; the first of each is the one before the first that is predicted
    lengths: Tensor  # how many of each row are predicted [rows]; the rest is padding
    sizes: Tensor  # rows of each source [sources], in the order in which they stand in `windows`

    @classmethod
    def of(cls, windows: Sequence[Sequence[int]], sizes: Sequence[int], length: int, padding: int) -> Rows:
        """Windows of up to `length + 1` tokens, padded."""
        lengths = np.array([len(window) for window in windows])
        found = np.full((len(windows), length + 1), padding, dtype=np.int32)
        found[np.arange(length + 1) < lengths[:, None]] = np.fromiter(chain.from_iterable(windows), dtype=np.int32)
        return cls(torch.from_numpy(found), torch.from_numpy(lengths - 1), torch.tensor(sizes))

    def examples(self, rows: Tensor) -> Examples:
        """Rows by their number `[...]`, as examples `[..., length]`."""
        windows = self.windows[rows].long()
        mask = (torch.arange(windows.shape[-1] - 1) < self.lengths[rows].unsqueeze(-1)).float()
        return Examples(windows[..., :-1], windows[..., 1:], mask)


class TextTasks(TaskDistribution, ABC):
    """Draws a source for each task, then `k_shot` support and `k_query` query rows of it, without replacement.

    A text stands between boundaries. A list is read text by text: each starts a row of its own, and one that is longer
    than a row goes on in the next. Running text is one stream, cut into full rows. In either a row is what is
    predicted, given the token before it; of rows with the same inputs a source has only the first.

    Beside the loss, the mean over tokens in nats, `bits_per_character` is reported: bits of all that was predicted, by
    its number of characters, whatever a token is. The end of a text counts as a character, as a line's end would.

    A subclass implements `load`.

    Args:
        k_shot: support rows per task.
        k_query: query rows per task.
        length: tokens in a row.
        running: whether the texts of a source are one stream.
        tokens: of the texts; None: bytes.
    """

    def __init__(self, *, k_shot: int, k_query: int, length: int, running: bool, tokens: Tokens | None = None) -> None:
        check_at_least(1, k_shot=k_shot, k_query=k_query, length=length)
        self.k_shot, self.k_query, self.length, self.running = k_shot, k_query, length, running
        self.tokens = tokens or Bytes()
        self.spec = TaskSpec("sequence", (length,), self.tokens.vocabulary, ragged=not running)
        self._loaded: dict[Split, tuple[list[Source], Rows]] = {}

    @abstractmethod
    def load(self, split: Split) -> list[Source]:
        """The sources of a split; called once, at the first draw from it."""

    def sources(self, split: Split) -> list[Source]:
        """The sources that tasks are drawn from: those with rows enough."""
        return self._of(split)[0]

    def rows(self, split: Split) -> Rows:
        return self._of(split)[1]

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        return self.draw(self.drawn_numbers(num_tasks, split, generator), split, generator)

    def drawn_numbers(self, num_tasks: int, split: Split, generator: torch.Generator) -> Tensor:
        """The number of each task's source, `[tasks]`."""
        return torch.randint(len(self.rows(split).sizes), (num_tasks,), generator=generator)

    def drawn_from(self, num_tasks: int, split: Split, generator: torch.Generator) -> list[tuple[str, ...]] | None:
        names = [source.name for source in self.sources(split)]
        return [(self.source_of(names[n]),) for n in self.drawn_numbers(num_tasks, split, generator).tolist()]

    def source_of(self, name: str) -> str:
        """The unit of sampling to which a source belongs: a language, which may have several lists."""
        return name

    def draw(self, drawn: Tensor, split: Split, generator: torch.Generator) -> Episode:
        """One task of each of the sources whose numbers `[tasks]` are given."""
        rows = self.rows(split)
        starts = (rows.sizes.cumsum(0) - rows.sizes)[drawn]
        picked = distinct(rows.sizes[drawn], self.k_shot + self.k_query, generator)  # [tasks, rows]
        examples = rows.examples(starts.unsqueeze(-1) + picked)
        return Episode(examples.rows(slice(self.k_shot)), examples.rows(slice(self.k_shot, None)))

    def scores(self, prediction: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
        scores = super().scores(prediction, y, mask)
        return {**scores, "bits_per_character": self.bits_per_character(scores["loss"], y, mask)}

    def bits_per_character(self, loss: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """The mean loss over tokens `y` `[tasks, n, length]`, in nats `[tasks]`, as bits per character `[tasks]`."""
        per_token = masked_mean(self.tokens.characters.to(loss)[y], mask)
        return loss / math.log(2) / per_token.clamp(min=1e-9)

    def encode(self, texts: Sequence[str]) -> Examples:
        """Texts as the examples of one task, leaves `[1, rows, length]`; of running text the last row may overlap.

        Raises:
            UserError: there is no text.
        """
        if not any(texts):
            raise UserError("there is no text to adapt to")
        windows = self.windows([text for text in texts if text], overlap=True)
        rows = Rows.of(windows, [len(windows)], self.length, self.tokens.boundary)
        return rows.examples(torch.arange(len(windows)).unsqueeze(0))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a row of tokens: that from its first token, or the boundary before that, to the next boundary."""
        row = list(tokens)
        row = row[1:] if row[:1] == [self.tokens.boundary] else row
        end = row.index(self.tokens.boundary) if self.tokens.boundary in row else len(row)
        return self.tokens.decode(row[:end])

    def windows(self, texts: Sequence[str], *, overlap: bool = False) -> list[list[int]]:
        """The rows of texts, none empty: windows of up to `length + 1` tokens, all but the first of them predicted.

        The end of running text, if it fills no row, is left out, or makes a row with the text before it: `overlap`.
        """
        boundary, length = self.tokens.boundary, self.length
        encoded = [[*self.tokens.encode(text), boundary] for text in texts]
        found = []
        for tokens in [chain.from_iterable(encoded)] if self.running else encoded:
            stream = [boundary, *tokens]
            starts = list(range(0, len(stream) - 1, length))
            if self.running and starts[-1] + length >= len(stream):
                last = starts.pop()
                if overlap:
                    starts.append(max(0, min(last, len(stream) - 1 - length)))
            found += [stream[start : start + length + 1] for start in starts]
        return found

    def distinct_windows(self, source: Source) -> list[list[int]]:
        """The rows of a source, the first of those with the same inputs."""
        texts = source.texts if self.running else dict.fromkeys(source.texts)
        found: dict[tuple[int, ...], list[int]] = {}
        for window in self.windows([text for text in texts if text]):
            found.setdefault(tuple(window[:-1]), window)
        return list(found.values())

    def _of(self, split: Split) -> tuple[list[Source], Rows]:
        if split not in self._loaded:
            found = [(source, self.distinct_windows(source)) for source in self.load(split)]
            kept = [(source, windows) for source, windows in found if len(windows) >= self.k_shot + self.k_query]
            if not kept:
                what = f"no source of the {split} split has {self.k_shot} + {self.k_query} rows of {self.length} tokens"
                raise UserError(f"{type(self).__name__}: {what}: smaller ones need less")
            sizes, every = [len(windows) for _, windows in kept], [row for _, windows in kept for row in windows]
            rows = Rows.of(every, sizes, self.length, self.tokens.boundary)
            self._loaded[split] = [source for source, _ in kept], rows
        return self._loaded[split]


def as_text(task: TaskDistribution) -> TextTasks:
    """The task distribution itself, where it is one of text; any other is refused."""
    if not isinstance(task, TextTasks):
        raise UserError(f"{type(task).__name__} is no text task")
    return task
