"""Reading a sequence in parts: what a base layer has read, it remembers while it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mlframework.errors import UserError

__all__ = ["Recalls", "recalled", "recalling"]


class Recalls(nn.Module):
    """A module whose output at a position depends on earlier ones, and that can read a sequence in parts.

    Its `forward` starts from `past`, and hands what the next part will need to `remember`.
    """

    #: Whether the sequence may go on in the next call.
    remembers: bool = False
    #: What was read so far, in the module's own form; None: nothing.
    past: Any = None

    def remember(self, read: Any) -> None:
        """Keeps what was read, if the sequence may go on."""
        if self.remembers:
            self.past = read


@contextmanager
def recalling(module: nn.Module) -> Iterator[None]:
    """Within this context the inputs of successive calls are parts of one sequence; after it all is forgotten.

    `module(x[:, :5])` and then `module(x[:, 5:])` are together what `module(x)` is. The calls are for the same rows,
    each module is called once in each, and never under vmap, whose tensors cannot be kept: the loop engine with one
    task. They may be made through `torch.func.functional_call`.

    Raises:
        UserError: no part of the module can remember what it reads.
    """
    parts = [part for part in module.modules() if isinstance(part, Recalls)]
    if not parts:
        raise UserError(
            f"base_layer: {type(module).__name__} reads no sequence in parts: none of its modules `Recalls`"
        )
    if any(part.remembers for part in parts):
        raise RuntimeError("the module is recalling already: two sequences cannot be read at once")
    try:
        for part in parts:
            part.remembers = True
        yield
    finally:
        for part in parts:
            part.remembers, part.past = False, None


def recalled(module: nn.Module) -> bool:
    """Whether the module has read the beginning of a sequence that goes on."""
    return any(part.past is not None for part in module.modules() if isinstance(part, Recalls))
