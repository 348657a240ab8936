"""A trained algorithm, or one that is adapted to a task, in one file: tensors as safetensors, its parts as JSON."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.weight_files import weights_follow
from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import UserError
from mlframework.files import KeepsArguments, as_json
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.reading import MOST_WEIGHTS, parsed_json, read_bytes
from mlframework.runs.trusted import is_of_plug_in
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training import checkpoint

__all__ = ["OwnNumbers", "SpecOnly", "Stored", "holds_model", "of_classes", "read", "read_model", "save", "save_model"]

#: The entries in the file's metadata: the parts of the algorithm, and of a task's own model.
PARTS, MODEL = "mlframework.parts", "mlframework.model"

#: The rooms whose classes a file may name.
ROOMS = ("mlframework.base_layers", "mlframework.inner_loop", "mlframework.meta_layers", "mlframework.tasks")


class SpecOnly(TaskDistribution):
    """Stands for a task whose data did not go into the file: it has the spec, the loss and the metrics."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec

    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        raise UserError("the file holds no data to draw tasks from: set meta_layer.task to a task distribution")


class OwnNumbers(NamedTuple):
    """A user's own support set as numbers, where a task scales its inputs and targets by them; else None."""

    x: Tensor | None
    y: Tensor | None


class Stored(NamedTuple):
    """A task's own model in a file."""

    meta_layer: MetaLayer
    adapted: Adapted  # leaves [1, ...]
    support: Examples  # leaves [1, n, ...]
    own: OwnNumbers | None
    n_way: int | None
    labels: Sequence[Any] | None  # of the classes: texts, numbers or truth values


def save(meta_layer: MetaLayer, path: str | Path) -> None:
    """Writes an algorithm to a file that `load` reads.

    The arguments of the constructors go into the file as JSON. A task that holds arrays is left out; its spec, which
    says the loss and the metrics, goes in.

    Raises:
        UserError: an argument cannot be written as JSON, as a module of torch's own.
    """
    checkpoint.save_weights(
        Path(path), without_regularisers(meta_layer), metadata={PARTS: as_json(parts_of(meta_layer))}
    )


def without_regularisers(meta_layer: MetaLayer) -> MetaLayer:
    """The same algorithm as a file has it: nobody trains on with a file."""
    same = copy.copy(meta_layer)
    vars(same)["_modules"] = {**vars(meta_layer)["_modules"], "regularisers": nn.ModuleDict()}
    return same


def parts_of(meta_layer: MetaLayer) -> dict[str, Any]:
    """The constructors' arguments of an algorithm and its parts, and what its task keeps of the data."""
    args, keywords = meta_layer.constructor_arguments
    # Not meta_layer.base_layer, which an algorithm on features has cut.
    base_layer = next(each for each in (*args, *keywords.values()) if isinstance(each, nn.Module))
    task = described_task(meta_layer.task)
    kept = {} if task["_target_"] == "SpecOnly" else meta_layer.task.kept()
    return {"task": task, "kept": kept, "base_layer": described(base_layer), "algorithm": described(meta_layer)}


class Model(nn.Module):
    """The tensors of a task's own model, by the names that a file has them under."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.algorithm = without_regularisers(stored.meta_layer)
        own = {} if stored.own is None else stored.own._asdict()
        named = {
            **{f"adapted_{number}": leaf for number, leaf in enumerate(leaves_of(stored.adapted))},
            **{f"support_{name}": leaf for name, leaf in stored.support._asdict().items()},
            **{f"own_{name}": leaf for name, leaf in own.items() if leaf is not None},
        }
        for name, leaf in named.items():
            self.register_buffer(name, leaf)


def save_model(stored: Stored, path: Path) -> None:
    """Writes a task's own model, with the algorithm, the support set and the labels."""
    labels = None if stored.labels is None else [label_in_json(label) for label in stored.labels]
    model = {"n_way": stored.n_way, "labels": labels, "own": stored.own is not None}
    metadata = {PARTS: as_json(parts_of(stored.meta_layer)), MODEL: as_json(model)}
    checkpoint.save_weights(path, Model(stored), metadata=metadata)


def holds_model(path: Path) -> bool:
    """Whether a file that this module wrote holds a task's own model, beside the algorithm."""
    return MODEL in metadata_of(path)


def label_in_json(label: Any) -> Any:
    plain = label.item() if hasattr(label, "item") else label
    if not isinstance(plain, str | bool | int | float):
        raise UserError(f"classes_: {plain!r} cannot be saved: labels must be texts, numbers or truth values")
    return plain


def read_model(path: Path, classes: Sequence[type], device: torch.device) -> Stored:
    """A task's own model in a file that `save_model` wrote; for `classes` see `read`."""
    text = metadata_of(path).get(MODEL)
    if text is None:
        raise UserError(f"{path}: holds a trained algorithm that is not adapted: load() reads it")
    model, meta_layer = parsed_json(path, text), built_layer(path, classes)
    checkpoint.load_weights(path, meta_layer, prefix="algorithm.")
    meta_layer = meta_layer.to(device).eval()
    meta_layer.engine = "loop"
    if model["n_way"] is not None and meta_layer.any_n_way and meta_layer.task.class_names is None:
        meta_layer = of_classes(meta_layer, model["n_way"])
    content = read_bytes(path, most=MOST_WEIGHTS)
    tensors = {name: tensor.to(device) for name, tensor in checkpoint.from_bytes(content).items()}
    support = Examples(*(tensors[f"support_{name}"] for name in Examples._fields))
    with torch.no_grad():
        form = next(iter(meta_layer.trajectory(support, 0)))  # as it was before its first step: the same names
    adapted = with_leaves(form, iter(tensors[f"adapted_{i}"] for i in range(len(leaves_of(form)))))
    given = (tensors.get(f"own_{name}") for name in OwnNumbers._fields)  # of the user, who hands over the CPU's
    own = OwnNumbers(*(None if each is None else each.cpu() for each in given)) if model["own"] else None
    return Stored(meta_layer, adapted, support, own, model["n_way"], model["labels"])


def leaves_of(adapted: Adapted) -> list[Tensor]:
    """The tensors of a nest of dictionaries, tuples and lists, in its order."""
    if isinstance(adapted, Tensor):
        return [adapted]
    inside = adapted.values() if isinstance(adapted, Mapping) else adapted if isinstance(adapted, tuple | list) else ()
    return [leaf for each in inside for leaf in leaves_of(each)]


def with_leaves(form: Adapted, leaves: Iterator[Tensor]) -> Adapted:
    """A nest of the same form with other tensors, in its order."""
    if isinstance(form, Tensor):
        return next(leaves)
    if isinstance(form, Mapping):
        return {name: with_leaves(each, leaves) for name, each in form.items()}
    if isinstance(form, tuple | list):
        inside = [with_leaves(each, leaves) for each in form]
        return type(form)(*inside) if hasattr(form, "_fields") else type(form)(inside)
    return form


def of_classes(meta_layer: MetaLayer, n_way: int) -> MetaLayer:
    """The same algorithm, with the same parameters, for tasks of so many classes; see `MetaLayer.any_n_way`."""
    task, layer = copy.copy(meta_layer.task), copy.copy(meta_layer)
    task.spec = task.spec._replace(out_features=n_way)
    layer.task = task
    return layer


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
    if holds_model(path):
        raise UserError(f"{path}: holds a model that is adapted to a task: TaskModel.load() reads it")
    meta_layer = built_layer(path, classes)
    checkpoint.load_weights(path, meta_layer)
    return meta_layer


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in a file that this module wrote."""
    metadata = checkpoint.read_metadata(path)
    if PARTS not in metadata:
        raise UserError(f"{path}: holds weights alone: save() writes files that load() can read")
    return metadata


def built_layer(path: Path, classes: Sequence[type]) -> MetaLayer:
    """The algorithm that a file describes, with initial weights."""
    own = {name_of(kind): kind for kind in (*classes, SpecOnly)} | {"SpecOnly": SpecOnly}
    parts = parsed_json(path, metadata_of(path)[PARTS])
    try:
        return built_from(parts, own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"damaged, or of another version: its parts cannot be built ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {why}") from error


def built_from(parts: dict[str, Any], own: Mapping[str, type]) -> MetaLayer:
    """The algorithm that `parts_of` described; `own` are further classes by name."""
    if parts["task"]["_target_"] == "SpecOnly":
        parts["task"]["spec"] = TaskSpec(*parts["task"]["spec"])
    task = built(parts["task"], own)
    if parts.get("kept"):
        task.restore(parts["kept"])
    with weights_follow():
        base_layer = built(parts["base_layer"], own, task.spec)
    meta_layer: MetaLayer = built(parts["algorithm"], own, base_layer, task)
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
    module, _, last = str(name).rpartition(".")
    kind = getattr(import_module(module), last, None) if module in ROOMS or is_of_plug_in(str(name)) else None
    if not isinstance(kind, type):
        own = "hand over a class of your own, as in load(path, classes=[MyLayer])"
        raise UserError(f"{name} is no class of mlframework or of an installed plug-in: {own}")
    return kind
