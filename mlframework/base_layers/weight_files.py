"""Weights from files of other programs: read without running code, and fitted to a network by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.checksums import (
    DAMAGED,
    PACKED,
    has_checksum,
    in_words,
    is_packed,
    load_tensors,
    matches,
    zip_matches,
)
from mlframework.errors import UserError
from mlframework.reading import MOST_WEIGHTS, check_file

__all__ = ["SUFFIXES", "follow", "from_bytes", "load_base_layer", "load_network", "read_weights", "weights_follow"]

#: The suffixes of files that are read as safetensors, and of those that `torch.save` wrote.
SAFE, SAVED = (".safetensors",), (".bin", ".ckpt", ".pt", ".pth", ".tar")
SUFFIXES = (*SAFE, *SAVED)

#: See `weights_follow`.
FOLLOW: ContextVar[bool] = ContextVar("follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Within this context networks are built without their files of weights: those of a checkpoint follow."""
    token = FOLLOW.set(True)
    try:
        yield
    finally:
        FOLLOW.reset(token)


def follow() -> bool:
    """Whether weights follow."""
    return FOLLOW.get()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: of safetensors, or of a `state_dict()` that `torch.save` wrote.

    Nothing in the file is run. Names may lie one level deeper, as in `{"state_dict": ..., "epoch": 3}`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError("there is no such file of weights")
    check_file(path, most=MOST_WEIGHTS)
    if path.suffix in SAFE:
        try:
            return from_bytes(path.read_bytes())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"cannot be read as safetensors ({in_words(error)})") from error
    try:
        if is_packed(path):
            raise ValueError(PACKED)
        if has_checksum(path) and not zip_matches(path):
            raise ValueError(DAMAGED)
        content = load_tensors(path)
    except pickle.UnpicklingError as error:
        why = "holds other things than tensors, or is damaged: write it with torch.save(network.state_dict(), path)"
        raise UserError(why) from error
    except Exception as error:  # torch.load raises whatever a broken file provokes
        raise UserError(f"cannot be read as what torch.save writes ({in_words(error)})") from error
    return tensors_in(content)


def from_bytes(content: bytes) -> dict[str, Tensor]:
    """The tensors of a file in the format of safetensors, under all the names that `to_bytes` gave them.

    Raises:
        SafetensorError: the file is damaged.
    """
    if not matches(content):
        raise safetensors.SafetensorError(DAMAGED)
    tensors = safetensors.torch.load(content)
    # The format: the length of the header in eight bytes, the header as JSON, the tensors.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    others = header.get("__metadata__", {})
    return {**tensors, **{name: tensors[first] for name, first in others.items() if first in tensors}}


def tensors_in(content: Any) -> dict[str, Tensor]:
    """The only dictionary of tensors by name in the content of a file."""
    found = [content, *content.values()] if isinstance(content, Mapping) else []
    states = [each for each in found if is_state(each)]
    if len(states) != 1:
        keys = f" among {', '.join(map(str, content))}" if isinstance(content, Mapping) and content else ""
        raise UserError(f"holds {len(states) or 'no'} state dicts{keys}: save the one that is meant alone")
    return {name: tensor for name, tensor in states[0].items() if isinstance(tensor, Tensor)}


def is_state(value: Any) -> bool:
    """Whether a value is a state dict; a network's extra state may stand among its tensors."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(each, Tensor) for each in value.values()) and all(isinstance(name, str) for name in value)


def load_network(network: nn.Module, path: str | Path, *, without: str | None = None) -> None:
    """Loads a file of weights into a network of the same architecture.

    Args:
        without: the name of the network's head, whose weights the file may lack, or hold in other shapes.
    """
    tensors = renamed(read_weights(path), network.state_dict())
    load_fitting(network, tensors, optional=() if without is None else (f"{without}.",))


def load_base_layer(base_layer: BaseLayer, path: str | Path) -> list[str]:
    """Loads a file of weights into a base layer, or into its body alone; returns the names that it left out.

    Names in the file are those of the base layer, as in a run's checkpoints (`base_layer.features.0.weight`,
    `features.0.weight`), or those of its body (`0.weight`). The head stays as it is where the file has none that fits.
    """
    tensors = read_weights(path)
    for prefix in ("base_layer.", ""):
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if any(name.startswith("features.") for name in own) and own.keys() & base_layer.state_dict().keys():
            of_base_layer = {n: t for n, t in own.items() if n.startswith(("features.", "head."))}
            return load_fitting(base_layer, of_base_layer, optional=("head.",))
    own = renamed(tensors, base_layer.body.state_dict())
    known = base_layer.body.state_dict().keys()
    load_fitting(base_layer.body, {name: t for name, t in own.items() if name in known})
    return [*(name for name in own if name not in known), *(f"head.{name}" for name in base_layer.head.state_dict())]


def renamed(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a prefix that all their names share, as in `module.`, if then more of them are wanted."""
    first = next(iter(tensors), "")
    parts = first.split(".")[:-1]
    prefixes = ["", *(".".join(parts[:count]) + "." for count in range(1, len(parts) + 1))]
    shared = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in tensors)]
    best = max(shared, key=lambda prefix: len({name.removeprefix(prefix) for name in tensors} & wanted.keys()))
    return {name.removeprefix(best): tensor for name, tensor in tensors.items()}


def load_fitting(module: nn.Module, tensors: Mapping[str, Tensor], *, optional: Sequence[str] = ()) -> list[str]:
    """Loads tensors by name; returns the names with an `optional` prefix that do not fit, and stay as they are."""
    state = module.state_dict()
    faults = {name: fault for name in {**state, **tensors} if (fault := misfit(name, state, tensors))}
    # Counts of batches came later than the first files of batch norms; nothing reads them.
    left = [name for name in faults if name.startswith(tuple(optional)) or name.endswith(".num_batches_tracked")]
    if others := [name for name in faults if name not in left]:
        more = f", and {len(others) - 1} more differ" if others[1:] else ""
        raise UserError(f"weights of another architecture: {others[0]} is {faults[others[0]]}{more}")
    module.load_state_dict({**state, **{name: t for name, t in tensors.items() if name not in left}})
    return [name for name in left if name.startswith(tuple(optional))] if optional else []


def misfit(name: str, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """How a tensor of a file differs from that of a module; None where they fit."""
    have = tuple(tensors[name].shape) if name in tensors else "absent"
    need = tuple(state[name].shape) if name in state else "absent"
    return None if have == need else f"{have} there and {need} here"
