"""Checkpoints: what a run needs to continue bit for bit, and the best weights; both load without running code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import nn

from mlframework.errors import UserError
from mlframework.files import atomic

__all__ = ["Progress", "load_weights", "read_metadata", "restore", "save_weights", "write"]


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: outer steps done.
        best: the best monitored value so far; None before the first validation at which it was finite.
        best_step: where it was.
        seconds: spent training, over all the processes that had a part in it.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0


def write(path: Path, *, meta_layer: nn.Module, outer: Any, generator: torch.Generator, progress: Progress) -> None:
    """Writes the state of a training: meta-parameters, optimizer, schedule, choices, all generators, how far it is."""
    state = state_of(meta_layer, outer, generator, progress)
    with atomic(path) as part:
        torch.save(state, part)


def state_of(meta_layer: nn.Module, outer: Any, generator: torch.Generator, progress: Progress) -> dict[str, Any]:
    """What `write` writes."""
    return {
        "meta_layer": meta_layer.state_dict(),
        "optimizer": outer.optimizer.state_dict(),
        "scheduler": outer.scheduler.state_dict(),
        "choices": outer.planner.choices(),
        "generators": {"tasks": generator.get_state(), "torch": torch.get_rng_state(), "cuda": cuda_states()},
        "progress": progress._asdict(),
    }


def restore(path: Path, *, meta_layer: nn.Module, outer: Any, generator: torch.Generator) -> Progress:
    """Reads what `write` wrote into the objects at hand, and says how far the run was."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file provokes
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__})") from error
    load_state(meta_layer, state["meta_layer"], path)
    outer.optimizer.load_state_dict(state["optimizer"])
    outer.scheduler.load_state_dict(state["scheduler"])
    outer.planner.restore_choices(state.get("choices", {}))
    generator.set_state(state["generators"]["tasks"])
    torch.set_rng_state(state["generators"]["torch"])
    if state["generators"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["generators"]["cuda"])
    return Progress(**state["progress"])


def cuda_states() -> list[torch.Tensor]:
    """The states of the GPUs' generators; none where there is no GPU."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def save_weights(path: Path, module: nn.Module, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a module's parameters and buffers as safetensors, with text by name; see `to_bytes`."""
    content = to_bytes(module, metadata or {})
    with atomic(path) as part:
        part.write_bytes(content)


def to_bytes(module: nn.Module, metadata: Mapping[str, str] = {}) -> bytes:
    """A module's parameters and buffers in the format of safetensors.

    A tensor of several names is written once, under the first; the file's metadata maps the other names to it. Views
    that share memory without being the same tensor are written each for itself.
    """
    state = module.state_dict()
    firsts = first_names(state)
    # Cloned, for safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if firsts[name] == name
    }
    others = {name: first for name, first in firsts.items() if name != first}
    return safetensors.torch.save(tensors, {**others, **metadata})


def first_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each name in a state dict with the first name of the same tensor."""
    firsts: dict[Any, str] = {}
    return {name: firsts.setdefault(identity(tensor) or name, name) for name, tensor in state.items()}


def identity(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Equal for names of one tensor; None for an empty one, which has no memory to tell it by."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else None


def load_weights(path: Path, module: nn.Module, *, prefix: str = "") -> None:
    """Reads what `save_weights` wrote into a module of the same architecture.

    Args:
        path: of the file.
        module: what it is read into.
        prefix: only tensors whose names start with it are read, under what follows it.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint: no run there, or none that has come to a validation")
    with safetensors_errors(path):
        tensors = from_bytes(path.read_bytes())
    load_state(module, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}, path)


def from_bytes(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors in what `to_bytes` returned, under all their names."""
    tensors = safetensors.torch.load(content)
    # The format: the length of the header in eight bytes, the header as JSON, the tensors.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    others = header.get("__metadata__", {})
    return {**tensors, **{name: tensors[first] for name, first in others.items() if first in tensors}}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts by name in a file that `save_weights` wrote."""
    with safetensors_errors(path), safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turns what a broken file provokes into one line."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error


def load_state(module: nn.Module, tensors: dict[str, torch.Tensor], path: Path | str) -> None:
    """Loads a state dict, or says in one line where its architecture differs."""
    state = module.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            have, need = found.get(name, "absent"), wanted.get(name, "absent")
            raise UserError(f"{path}: a checkpoint of another architecture: {name} is {have} there and {need} here")
    for name, first in first_names(state).items():
        if name != first and not torch.equal(tensors[name], tensors[first]):
            why = f"{name} and {first} are one tensor here and two there"
            raise UserError(f"{path}: a checkpoint of another architecture: {why}")
    module.load_state_dict(tensors)
