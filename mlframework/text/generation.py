"""Generation: texts drawn token by token from a task's own model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.base_layers.recall import readers, recalling
from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.tasks.text.text_tasks import as_text

__all__ = ["Sampling", "draw", "generate", "truncated"]


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        length: tokens at most, after the prompt.
        temperature: divides the logits; below 1 likely tokens become likelier, 0 takes the likeliest.
        top_p: tokens are drawn from the likeliest ones that together have this probability (nucleus sampling: Holtzman
            et al. 2020, arXiv:1904.09751, section 3.1); 1 leaves all.
        stop: a text ends before this; None: only where its end is drawn.
    """

    length: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    stop: str | None = None

    def check(self) -> None:
        """Refuses settings out of range."""
        at_least("length", self.length, 1)
        if self.temperature < 0:
            raise InvalidValue("temperature", self.temperature, "must be at least 0 (0: always the likeliest token)")
        if not 0 < self.top_p <= 1:
            raise InvalidValue("top_p", self.top_p, "must be above 0 and at most 1 (1: all tokens)")
        if self.stop == "":
            raise InvalidValue("stop", self.stop, "must hold at least one character, or be null")


def generate(
    meta_layer: MetaLayer,
    adapted: Adapted,
    *,
    count: int,
    sampling: Sampling,
    generator: torch.Generator,
    prompt: str = "",
) -> list[str]:
    """Texts in the manner of the one task that `adapted` (leaves `[1, ...]`) is a model of, each with its prompt."""
    sampling.check()
    at_least("n", count, 1)
    task = as_text(meta_layer.task)
    start = torch.tensor([task.tokens.boundary, *task.tokens.encode(prompt)]).repeat(count, 1)
    texts = (task.decode(row) for row in sample_rows(meta_layer, adapted, start, sampling, generator))
    return [text if sampling.stop is None else text.partition(sampling.stop)[0] for text in texts]


def sample_rows(
    meta_layer: MetaLayer, adapted: Adapted, rows: Tensor, sampling: Sampling, generator: torch.Generator
) -> list[list[int]]:
    """Rows of tokens that go on from `rows` `[n, start]` to the first boundary that is drawn, or the full length.

    A base layer that can recall reads one token at each step; any other reads the whole row again.
    """
    boundary = as_text(meta_layer.task).tokens.boundary
    device = next(meta_layer.parameters()).device
    ended = torch.zeros(len(rows), dtype=torch.bool)
    was_training, engine = meta_layer.training, meta_layer.engine
    meta_layer.eval()
    meta_layer.engine = "loop"  # one task; a memory must not be a vmapped tensor
    remembers = readers(meta_layer.base_layer)
    try:
        with torch.no_grad(), recalling(meta_layer.base_layer) if remembers else nullcontext():
            new = rows
            for _ in range(sampling.length):
                read = new if remembers else rows
                logits = meta_layer.predict(adapted, read.unsqueeze(0).to(device))[0, :, -1].cpu()
                new = draw(logits, sampling, generator).masked_fill(ended, boundary).unsqueeze(1)
                rows = torch.cat([rows, new], dim=1)
                ended |= new.squeeze(1) == boundary
                if ended.all():
                    break
    finally:
        meta_layer.train(was_training)
        meta_layer.engine = engine
    return rows.tolist()


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token `[n]` for each row of logits `[n, vocabulary]`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = truncated((logits.double() / sampling.temperature).softmax(-1), sampling.top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def truncated(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probabilities `[n, vocabulary]` sum to `top_p`; the others become 0.

    >>> truncated(torch.tensor([[0.5, 0.2, 0.3]]), 0.7)
    tensor([[0.5000, 0.0000, 0.3000]])
    """
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0.0))
