"""Tasks of text: a task is a source, its examples are rows of its text, and the next token is predicted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Split, TaskSpec, masked_mean
from mlframework.errors import UserError
from mlframework.screen import stage
from mlframework.tasks.few_shot import check_at_least, distinct
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text.tokens import Bytes, Tokens

__all__ = ["Rows", "Source", "TextTasks", "Windows", "as_text"]


class Source(NamedTuple):
    """One task: an author, a speaker, a language, a list."""

    name: str  # for messages and figures
    texts: Sequence[str]  # strings of a list, or speeches, paragraphs, lines in their order


class Windows(NamedTuple):
    """The rows of one source."""

    tokens: np.ndarray  # [rows, length + 1]; the first of each is the one before the first that is predicted
    lengths: np.ndarray  # how many of each row are predicted [rows]; boundaries behind them are padding

    def distinct(self) -> Windows:
        """The first of all rows with the same inputs, in their order."""
        keys = np.column_stack([self.tokens[:, :-1], self.lengths])  # shorter inputs are no longer ones with padding
        as_bytes = keys.view(np.dtype((np.void, keys.itemsize * keys.shape[1])))[:, 0]
        first = np.sort(np.unique(as_bytes, return_index=True)[1])
        return Windows(self.tokens[first], self.lengths[first])


class Rows(NamedTuple):
    """The rows of all sources of a split."""

    windows: Tensor  # tokens [rows, length + 1]; the first of each is the one before the first that is predicted
    lengths: Tensor  # how many of each row are predicted [rows]; the rest is padding
    sizes: Tensor  # rows of each source [sources], in the order in which they stand in `windows`

    @classmethod
    def of(cls, sources: Sequence[Windows]) -> Rows:
        tokens, lengths = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*sources, strict=True))
        return cls(tokens, lengths, torch.tensor([len(each.lengths) for each in sources]))

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

        Running text of fewer than `length` tokens makes one row that is as short, so that nothing of it is padding.

        Raises:
            UserError: there is no text.
        """
        if not any(texts):
            raise UserError("there is no text to adapt to")
        rows = Rows.of([self.windows([text for text in texts if text], overlap=True)])
        examples = rows.examples(torch.arange(len(rows.lengths)).unsqueeze(0))
        longest = int(rows.lengths.max()) if self.running else self.length
        return Examples(*(leaf[..., :longest] for leaf in examples))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a row of tokens: that from its first token, or the boundary before that, to the next boundary."""
        row = list(tokens)
        row = row[1:] if row[:1] == [self.tokens.boundary] else row
        end = row.index(self.tokens.boundary) if self.tokens.boundary in row else len(row)
        return self.tokens.decode(row[:end])

    def windows(self, texts: Sequence[str], *, overlap: bool = False) -> Windows:
        """The rows of texts, none empty: windows of up to `length + 1` tokens, all but the first of them predicted.

        The end of running text, if it fills no row, is left out, or makes a row with the text before it: `overlap`.
        """
        stream, places = self.tokens.stream(texts)
        if self.running:
            starts, ends = full_starts(int(places[-1]), self.length, overlap), places[-1]
        else:
            starts, ends = list_starts(places, self.length)
        lengths = np.minimum(self.length, ends - starts)
        padded = np.pad(stream, (0, self.length), constant_values=self.tokens.boundary)
        found = np.lib.stride_tricks.sliding_window_view(padded, self.length + 1)[starts]
        found[np.arange(self.length + 1) > lengths[:, None]] = self.tokens.boundary
        return Windows(found, lengths)

    def distinct_windows(self, source: Source) -> Windows:
        """The rows of a source, the first of those with the same inputs."""
        texts = source.texts if self.running else dict.fromkeys(source.texts)
        return self.windows([text for text in texts if text]).distinct()

    def _of(self, split: Split) -> tuple[list[Source], Rows]:
        if split not in self._loaded:
            with stage(f"reading the texts of {split} tasks"):
                found = [(source, self.distinct_windows(source)) for source in self.load(split)]
            kept = [
                (source, windows) for source, windows in found if len(windows.lengths) >= self.k_shot + self.k_query
            ]
            if not kept:
                what = f"no source of the {split} split has {self.k_shot} + {self.k_query} rows of {self.length} tokens"
                raise UserError(f"{type(self).__name__}: {what}: smaller ones need less")
            self._loaded[split] = [source for source, _ in kept], Rows.of([windows for _, windows in kept])
        return self._loaded[split]


def full_starts(predicted: int, length: int, overlap: bool) -> np.ndarray:
    """Where the rows of a stream of `predicted` tokens and the boundary before them start; see `TextTasks.windows`."""
    starts = np.arange(0, predicted - length + 1, length)
    return np.append(starts, max(0, predicted - length)) if overlap and predicted % length else starts


def list_starts(places: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of texts between the boundaries at `places` start, and where the text of each row ends."""
    counts = -(-np.diff(places) // length)  # rows of each text
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(places[:-1], counts) + nth * length, np.repeat(places[1:], counts)


def as_text(task: TaskDistribution) -> TextTasks:
    """The task distribution itself, where it is one of text; any other is refused."""
    if not isinstance(task, TextTasks):
        raise UserError(f"{type(task).__name__} is no text task")
    return task
