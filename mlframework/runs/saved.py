"""A trained algorithm in one file, without a run folder: weights as safetensors, the parts it is made of as JSON."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.weight_files import weights_follow
from mlframework.episode import Episode, Split, TaskSpec
from mlframework.errors import UserError
from mlframework.files import KeepsArguments, as_json
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training import checkpoint

__all__ = ["SpecOnly", "read", "save"]

#: The entry in the file's metadata.
PARTS = "mlframework.parts"

#: The rooms whose classes a file may name.
ROOMS = ("mlframework.base_layers", "mlframework.inner_loop", "mlframework.meta_layers", "mlframework.tasks")


class SpecOnly(TaskDistribution):
    """Stands for a task whose data did not go into the file: it has the spec, the loss and the metrics."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        raise UserError("the file holds no data to draw tasks from: set meta_layer.task to a task distribution")


def save(meta_layer: MetaLayer, path: str | Path) -> None:
    """Writes an algorithm to a file that `load` reads.

    The arguments of the constructors go into the file as JSON. A task that holds arrays is left out; its spec, which
    says the loss and the metrics, goes in.

    Raises:
        UserError: an argument cannot be written as JSON, as a module of torch's own.
    """
    args, keywords = meta_layer.constructor_arguments
    # Not meta_layer.base_layer, which an algorithm on features has cut.
    base_layer = next(each for each in (*args, *keywords.values()) if isinstance(each, nn.Module))
    task = described_task(meta_layer.task)
    parts = {"task": task, "base_layer": described(base_layer), "algorithm": described(meta_layer)}
    own, meta_layer.regularisers = meta_layer.regularisers, nn.ModuleDict()  # nobody trains on with a file
    try:
        checkpoint.save_weights(Path(path), meta_layer, metadata={PARTS: as_json(parts)})
    finally:
        meta_layer.regularisers = own


def described_task(task: TaskDistribution) -> dict[str, Any]:
    """A task, or its spec alone where its arguments are data or its class is in no package."""
    try:
        part: dict[str, Any] = described(task)
        class_named(part["_target_"])
    except UserError:
        if any(getattr(type(task), name) is not getattr(TaskDistribution, name) for name in ("loss", "metrics")):
            raise
        return {"_target_": "SpecOnly", "spec": list(task.spec)}
    return part


def described(value: Any) -> Any:
    """A constructor's argument as JSON; an object is its class and its own arguments, under `_target_`.

    Base layers, tasks and specs are left out of arguments: `read` builds them first and hands them over.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [described(each) for each in value]
    if isinstance(value, type):
        value = functools.partial(value)
    if isinstance(value, functools.partial) and isinstance(value.func, type) and not value.args:
        return {"_target_": name_of(value.func), "_partial_": True, **described(value.keywords)}
    if isinstance(value, KeepsArguments):
        args, keywords = value.constructor_arguments
        given = inspect.signature(type(value)).bind(*args, **keywords).arguments
        others = {n: each for n, each in given.items() if not isinstance(each, BaseLayer | TaskDistribution | TaskSpec)}
        return {"_target_": name_of(type(value)), **described(others)}
    why = "build it in a BaseLayer of your own that takes plain values"
    raise UserError(f"{type(value).__name__} cannot be saved: {why}")


def name_of(kind: type) -> str:
    """The public name of a class, or where it is defined."""
    for room in ROOMS:
        if getattr(import_module(room), kind.__name__, None) is kind:
            return f"{room}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def read(path: Path, classes: Sequence[type] = ()) -> MetaLayer:
    """The algorithm in a file that `save` wrote.

    The file may name `classes`, and those of this package and of installed plug-ins: a file from somebody else runs no
    other code.
    """
    text = checkpoint.read_metadata(path).get(PARTS)
    if text is None:
        raise UserError(f"{path}: holds weights alone: save() writes files that load() can read")
    own = {name_of(kind): kind for kind in (*classes, SpecOnly)} | {"SpecOnly": SpecOnly}
    parts = json.loads(text)
    if parts["task"]["_target_"] == "SpecOnly":
        parts["task"]["spec"] = TaskSpec(*parts["task"]["spec"])
    task = built(parts["task"], own)
    with weights_follow():
        base_layer = built(parts["base_layer"], own, task.spec)
    meta_layer: MetaLayer = built(parts["algorithm"], own, base_layer, task)
    checkpoint.load_weights(path, meta_layer)
    return meta_layer


def built(part: Any, own: Mapping[str, type], *args: Any) -> Any:
    """What `described` was given; `args` go to the outermost constructor, `own` are further classes by name."""
    if isinstance(part, list):
        return [built(each, own) for each in part]
    if not isinstance(part, dict):
        return part
    values = {name: built(each, own) for name, each in part.items() if name not in ("_target_", "_partial_")}
    if "_target_" not in part:
        return values
    name = part["_target_"]
    kind = own.get(name) or class_named(name)
    return functools.partial(kind, **values) if part.get("_partial_") else kind(*args, **values)


def class_named(name: str) -> type:
    """A class of this package or of an installed plug-in; any other is refused."""
    module, _, last = name.rpartition(".")
    plug_ins = {entry.value.partition(".")[0] for entry in entry_points(group="mlframework.conf")}
    known = module in ROOMS or name.partition(".")[0] in plug_ins
    kind = getattr(import_module(module), last, None) if known else None
    if not isinstance(kind, type):
        own = "hand over a class of your own, as in load(path, classes=[MyLayer])"
        raise UserError(f"{name} is no class of mlframework or of an installed plug-in: {own}")
    return kind
