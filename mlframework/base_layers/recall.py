"""Networks over sequences: their tasks, and reading in parts, by remembering what was read while they are told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue, UserError

__all__ = ["Recalls", "check_sequence", "is_recalling", "readers", "recalled", "recalling", "split"]


class Recalls(nn.Module):
    """A module whose output at a position depends on earlier ones, and that can read a sequence in parts.

    Where `memory` is not None, its `forward` goes on from there, and puts there what the next part will need.
    """

    #: What was read so far, in the module's own form, rows first; empty: nothing; None: the sequence does not go on.
    memory: tuple[Tensor, ...] | None = None


def readers(module: nn.Module) -> list[Recalls]:
    """The parts of the module that can remember what they read."""
    return [part for part in module.modules() if isinstance(part, Recalls)]


@contextmanager
def recalling(module: nn.Module) -> Iterator[None]:
    """Within this context the inputs of successive calls are parts of one sequence; after it all is forgotten.

    `module(x[:, :5])` and then `module(x[:, 5:])` are together what `module(x)` is. The calls are for the same rows,
    each module is called once in each, and never under vmap, whose tensors cannot be kept: the loop engine with one
    task. They may be made through `torch.func.functional_call`.

    Raises:
        UserError: no part of the module can remember what it reads.
    """
    parts = readers(module)
    if not parts:
        why = "reads no sequence in parts: none of its modules `Recalls`"
        raise UserError(f"base_layer: {type(module).__name__} {why}")
    if is_recalling(module):
        raise RuntimeError("the module is recalling already: two sequences cannot be read at once")
    try:
        for part in parts:
            part.memory = ()
        yield
    finally:
        for part in parts:
            part.memory = None


def is_recalling(module: nn.Module) -> bool:
    """Whether the inputs of successive calls are parts of one sequence."""
    return any(part.memory is not None for part in readers(module))


def recalled(module: nn.Module) -> bool:
    """Whether the module has read the beginning of a sequence that goes on."""
    return any(part.memory for part in readers(module))


def split(module: nn.Module, ways: int) -> None:
    """Each sequence that is being read goes on in so many ways: row `i` becomes rows `i * ways` to `(i + 1) * ways`."""
    for part in readers(module):
        if part.memory:
            part.memory = tuple(leaf.repeat_interleave(ways, dim=0) for leaf in part.memory)


def check_sequence(spec: TaskSpec, name: str, **sizes: int) -> None:
    """Refuses tasks that are no sequences, and sizes below 1."""
    if spec.kind != "sequence":
        other = "conv4" if len(spec.x_shape) == 3 else "mlp"
        why = f"reads sequences of tokens, this task is a {spec.kind}: use base_layer={other}"
        raise IncompatibleTask(f"base_layer={name} {why}")
    for field, value in sizes.items():
        if value < 1:
            raise InvalidValue(field, value, "must be at least 1")
