"""Checkpoints: what a run needs to continue bit for bit, and the best weights; both load without running code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors
import torch
from torch import nn

from mlframework import processes
from mlframework.base_layers.checksums import DAMAGED, in_words, matches, to_safetensors
from mlframework.base_layers.weight_files import from_bytes
from mlframework.errors import UserError
from mlframework.evaluation.part import Display
from mlframework.files import atomic
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.reading import MOST_WEIGHTS, read_bytes
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training import last_checkpoints
from mlframework.training.outer_loop import OuterLoop

__all__ = [
    "OtherArchitecture",
    "Progress",
    "Training",
    "damage",
    "load_weights",
    "read_metadata",
    "restore",
    "save_training",
    "save_weights",
    "state_of",
]


class OtherArchitecture(UserError):
    """A checkpoint whose tensors do not fit a module; `name` is the first one."""

    def __init__(self, path: Path | str, name: str, why: str) -> None:
        super().__init__(f"{path}: a checkpoint of another architecture: {why}")
        self.name = name


class Training(NamedTuple):
    """The parts of a training that has been set up."""

    task: TaskDistribution
    meta_layer: MetaLayer  # on its device
    outer: OuterLoop
    generator: torch.Generator  # draws the training episodes
    device: torch.device
    last: Path  # the file of the state at the last checkpoint
    best: Path  # the file of the weights of the best validation
    displays: Mapping[str, Display] = MappingProxyType({})  # by name
    check_folder: Callable[[], None] = lambda: None  # raises an OSError if the run folder is no longer this run's
    record_step: Callable[[int], None] = lambda step: None  # records the step of a checkpoint elsewhere


class Progress(NamedTuple):
    """How far a run is."""

    step: int = 0  # outer steps done
    best: float | None = None  # the best monitored value so far; None before the first that is finite
    best_step: int | None = None
    seconds: float = 0.0  # spent training, over all the processes that had a part in it


def state_of(training: Training, progress: Progress) -> dict[str, Any]:
    """The state of a training: meta-parameters, optimizer, schedule, choices, all generators, how far it is.

    All ranks call it together: `ranks` has the choices and generators of each.
    """
    of_ranks = processes.gathered(state_of_rank(training))
    return {
        "meta_layer": training.meta_layer.state_dict(),
        "optimizer": training.outer.optimizer.state_dict(),
        "scheduler": training.outer.scheduler.state_dict(),
        "choices": of_ranks[0]["choices"],
        "generators": {"tasks": training.generator.get_state(), **of_ranks[0]["generators"]},
        "ranks": of_ranks[1:],
        "progress": progress._asdict(),
    }


def state_of_rank(training: Training) -> dict[str, Any]:
    """The part of a training's state in which ranks differ."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "choices": training.outer.planner.choices(),
        "generators": {"torch": torch.get_rng_state(), "cuda": cuda},
    }


def of_this_rank(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a checkpoint's state for this rank; that of rank 0 where the run had another number of ranks."""
    others, rank = state.get("ranks", []), processes.rank()
    return others[rank - 1] if rank and len(others) + 1 == processes.count() else state


def save_training(training: Training, progress: Progress, *, keep: int) -> None:
    """Writes the last checkpoint, of which all ranks give their parts; so many are kept, this one included."""
    state = state_of(training, progress)
    if processes.leads():
        training.check_folder()
        last_checkpoints.write_checkpoint(training.last, state, keep=keep)
        training.record_step(progress.step)


def restore(training: Training, *, quiet: bool = False) -> Progress:
    """Loads the last checkpoint, a `state_of` a training, into the objects at hand, and returns how far the run was.

    A damaged one falls back to the one before, and this says so unless it is `quiet`.
    """
    # Ranks on other machines may not see the file.
    found, outer = processes.agreed(lambda: last_checkpoints.newest(training.last)), training.outer
    path, state = found.path, found.state
    if not quiet:
        found.tell()
    own = of_this_rank(state)
    load_state(training.meta_layer, state["meta_layer"], path)
    outer.optimizer.load_state_dict(state["optimizer"])
    outer.scheduler.load_state_dict(state["scheduler"])
    outer.planner.restore_choices(own.get("choices", {}))
    training.generator.set_state(state["generators"]["tasks"])
    torch.set_rng_state(own["generators"]["torch"])
    if own["generators"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(own["generators"]["cuda"])
    return Progress(**state["progress"])


def save_weights(path: Path, module: nn.Module, *, metadata: Mapping[str, str] = {}) -> None:
    """Writes a module's parameters and buffers as safetensors, with text by name; see `to_bytes`."""
    with atomic(path, durable=True) as part:
        part.write_bytes(to_bytes(module, metadata))


def to_bytes(module: nn.Module, metadata: Mapping[str, str] = {}) -> bytes:
    """A module's parameters and buffers in the format of safetensors, with a checksum.

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
    return to_safetensors(tensors, {**others, **metadata})


def first_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each name in a state dict with the first name of the same tensor; an empty one has no memory to tell it by."""
    firsts: dict[Any, str] = {}
    same = {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name for name, t in state.items()}
    return {name: firsts.setdefault(key, name) for name, key in same.items()}


def load_weights(path: Path, module: nn.Module, *, prefix: str = "") -> None:
    """Reads what `save_weights` wrote into a module of the same architecture.

    Only tensors whose names start with `prefix` are read, under the rest of their names.
    """
    tensors = processes.agreed(lambda: read_weights(path))
    load_state(module, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}, path)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint: no run there, or none that has come to a validation")
    with safetensors_errors(path):
        return from_bytes(read_bytes(path, most=MOST_WEIGHTS))


def damage(path: Path) -> str | None:
    """What is wrong with a file that `save_weights` wrote; None if it is whole."""
    try:
        with safetensors_errors(path):
            from_bytes(read_bytes(path, most=MOST_WEIGHTS))
    except UserError as error:
        return str(error)
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """The texts by name in a file that `save_weights` wrote."""
    with safetensors_errors(path):
        if not matches(read_bytes(path, most=MOST_WEIGHTS)):
            raise safetensors.SafetensorError(DAMAGED)
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turns what a broken file provokes into one line."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({in_words(error)})") from error


def load_state(module: nn.Module, tensors: dict[str, torch.Tensor], path: Path | str) -> None:
    """Loads a state dict, or says in one line where its architecture differs.

    Tensors that the module names as `unread` may have another shape; they are then left as they are.
    """
    state = module.state_dict()
    for name in getattr(module, "unread", ()):
        if name in tensors and tensors[name].shape != state[name].shape:
            tensors = {**tensors, name: state[name]}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            have, need = found.get(name, "absent"), wanted.get(name, "absent")
            raise OtherArchitecture(path, name, f"{name} is {have} there and {need} here")
    for name, first in first_names(state).items():
        if name != first and not torch.equal(tensors[name], tensors[first]):
            raise OtherArchitecture(path, name, f"{name} and {first} are one tensor here and two there")
    module.load_state_dict(tensors)
