"""Checks a config against the constructors that it names and the memory there is, before anything is built or drawn."""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.evaluation.number_format import shown
from mlframework.files import leaves

if TYPE_CHECKING:  # it imports torch, which --help does without
    from mlframework.episode import TaskSpec

__all__ = [
    *("check_config", "check_episodes", "check_keys", "given", "is_part", "located", "not_imported"),
    *("parameters", "parts"),
]

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", type(None): "null"}

#: The largest number in 32 bits.
LARGEST = 3.4028234e38

#: The largest whole number of any setting, and of a setting that counts steps or things in memory.
MOST_OF_ANY, MOST = 10**9, 10**6
COUNTS = (
    *("n_way", "k_shot", "k_query", "meta_batch", "chunk", "inner_steps", "test_inner_steps"),
    *("tasks", "validation_tasks", "order", "sources", "texts", "n", "length"),
)

#: Copies of an episode while it is drawn: numbers in 64 bits, and the arrays that they are drawn from.
COPIES = 3


def check_config(config: DictConfig, *, settings: Mapping[str, Any], required: Sequence[str] = ()) -> None:
    """Raises a `UserError` for the first value that cannot be right.

    Every interpolation resolves, every `_target_` can be imported, takes the settings that stand beside it and is given
    values of the types that its signature names. `settings` are the types of the keys that are no parts.
    """
    check_interpolations(config)
    check_numbers(config)
    for key, hint in settings.items():
        if not fits(config[key], hint):
            raise InvalidValue(key, config[key], f"must be {described(hint)}")
    for key in required:
        if not is_part(config.get(key)):
            raise InvalidValue(key, config.get(key), f"must be an option of the group {key}; --help lists them")
    for key, part in parts(config):
        check_names(key, part)
    # Typed values before interpolations: a wrong trainer.steps is typed once and referred to in many places.
    for derived in (False, True):
        for key, part in parts(config):
            check_types(key, part, derived=derived)


def check_interpolations(config: DictConfig) -> None:
    """Names the key whose interpolation goes nowhere, not a key that depends on it."""
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except InterpolationKeyError as error:
        missing = str(error.msg).split("'")[1]
        plain = cast(dict[Any, Any], OmegaConf.to_container(config, resolve=False))
        key = next((key for key, value in leaves(plain) if f"${{{missing}}}" in str(value)), error.full_key)
        raise UserError(f"{key}: refers to {missing}, which is not there") from error


def check_numbers(config: DictConfig) -> None:
    """Refuses numbers that float32 does not hold, counts beyond reason, and seeds that no generator takes."""
    for key, value in leaves(cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_number(key, number)


def check_number(key: str, number: float) -> None:
    name = key.rpartition(".")[2]
    if name == "seed" and isinstance(number, int):
        if not 0 <= number < 2**63:
            raise InvalidValue(key, number, "must be at least 0, and below 2^63")
    elif not abs(number) <= LARGEST:
        raise InvalidValue(key, number, "must be a finite number in 32 bits")
    elif isinstance(number, int) and number > (most := MOST if name in COUNTS else MOST_OF_ANY):
        raise InvalidValue(key, number, f"must be at most {most}")


def check_keys(config: DictConfig, known: Sequence[str]) -> None:
    """Refuses a key that nothing reads, neither the command, which reads those `known`, nor an interpolation."""
    tree = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    interpolations = " ".join(str(value) for _, value in leaves(tree) if "${" in str(value))
    for name in tree:
        if name not in known and not re.search(rf"\b{re.escape(name)}\b", interpolations):
            key, value = next(leaves({name: tree[name]}), (name, "{}"))
            why = f"nothing reads {name}{nearest(name, known)}; there are {', '.join(known)}"
            raise InvalidValue(key, value, why)


def check_episodes(config: DictConfig, spec: TaskSpec) -> None:
    """Refuses more examples per task, or more tasks at a time, than this machine's memory can hold.

    Nothing is drawn: the size follows from the keys that all tasks have; a missing key counts as one.
    """
    each = 4 * math.prod(spec.x_shape) + 8  # an input, its target and its mask
    task = {f"task.{name}": most(config.task.get(name)) for name in ("n_way", "k_shot", "k_query")}
    examples = task["task.n_way"] * (task["task.k_shot"] + task["task.k_query"])
    meta_batch, evaluation = config.trainer.meta_batch, config.get("evaluation") or {}
    chunk = evaluation.get("chunk") or 0
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for counts, tasks in (
        (task, 1),
        ({"trainer.meta_batch": meta_batch}, meta_batch),
        ({"evaluation.chunk": chunk}, chunk and min(chunk, evaluation.get("tasks", chunk))),
    ):
        size = COPIES * each * examples * tasks
        if size > there:
            key = max(counts, key=counts.__getitem__)
            why = f"such episodes take {shown(size / 1e9)} GB, and this machine has {shown(there / 1e9)} GB"
            raise InvalidValue(key, counts[key], why)


def most(count: Any) -> int:
    """The number, or the largest of a range; 1 if there is none."""
    numbers = count if isinstance(count, Sequence) else [count]
    return max((number for number in numbers if isinstance(number, int)), default=1)


def parts(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node that names a `_target_`, outer ones first, with its dotted key."""
    for name, node in config.items_ex(resolve=False):
        if isinstance(node, DictConfig):
            key = prefix + str(name)
            if is_part(node):
                yield key, node
            yield from parts(node, f"{key}.")


def is_part(node: Any) -> bool:
    return isinstance(node, DictConfig) and "_target_" in node


def located(name: str) -> Any:
    """The object of a dotted name; an error of its import comes through."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        owner, _, last = name.rpartition(".")
        if not owner or not f"{name}.".startswith(f"{error.name}."):  # a module that the named one imports
            raise
    return getattr(located(owner), last)


def not_imported(name: str, error: Exception, home: Path | None = None) -> str:
    """Why a name cannot be imported; where its module is not found, also where it has to be.

    Args:
        home: the folder in which a stored run was trained, where that is known.
    """
    why, module = f"cannot be imported ({error})", name.partition(".")[0]
    if module == "mlframework" or not isinstance(error, ModuleNotFoundError) or error.name != module:
        return why
    if home is not None and ((home / f"{module}.py").exists() or (home / module).exists()):
        typed = Path(sys.argv[0]).name if Path(sys.argv[0]).name.startswith("mlframework-") else "mlframework-evaluate"
        type_this = f"PYTHONPATH={shlex.quote(str(home))} {typed} ..."
        return f"{why}: it lies in {home}: type {type_this}, or in Python sys.path.append({str(home)!r})"
    trained = "" if home is None else f"; the run was trained in {home}, which does not hold it now"
    return f"{why}: {module}.py must lie in the current folder ({Path.cwd()}) or in one of PYTHONPATH{trained}"


def check_names(key: str, part: DictConfig) -> None:
    """The settings of a part are those of the callable that it names: none too many, none missing."""
    try:
        target = located(part._target_)
    except Exception as error:  # importing a user's module may raise anything
        raise InvalidValue(f"{key}._target_", part._target_, not_imported(part._target_, error)) from error
    if not callable(target):
        raise InvalidValue(f"{key}._target_", part._target_, "must name a class or a function")
    takes = parameters(target)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    for name in () if anything else given(part):
        if name not in takes:
            it_takes = f"it takes {', '.join(takes)}" if takes else "it takes none"
            why = f"{target.__name__} has no such setting{nearest(name, list(takes))}; {it_takes}"
            raise InvalidValue(f"{key}.{name}", part[name], why)
    for name, parameter in {} if part.get("_partial_") else takes.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name not in part:
            raise UserError(f"{key}.{name}: must be given, for {target.__name__}")


def check_types(key: str, part: DictConfig, *, derived: bool) -> None:
    """The values of a part, or with `derived` its interpolations, are of the types that the signature names."""
    target = located(part._target_)
    takes, hints = parameters(target), type_hints(target)
    for name in given(part):
        if part[name] is None and name in takes and takes[name].default is None:
            continue
        if OmegaConf.is_interpolation(part, name) is not derived or is_part(part[name]):
            continue
        if not fits(part[name], hints.get(name, Any)):
            raise InvalidValue(f"{key}.{name}", part[name], f"must be {described(hints[name])}")


def given(part: DictConfig) -> list[str]:
    """The settings of a part, without Hydra's own keys."""
    return [str(name) for name in part if not str(name).startswith("_")]


@functools.cache  # for the other jobs of a sweep
def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The types that a signature names; none if they cannot be evaluated."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}


@functools.cache
def parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable; anything for the few in C that have no signature."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return inspect.signature(lambda **anything: None).parameters


def fits(value: Any, hint: Any) -> bool:
    """Whether a config value is of a type; True for types that no config value shows.

    >>> fits(3, float), fits("3", float), fits(True, int), fits([1, 2], int | list[int])
    (True, False, False, True)
    """
    if hint is Any:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (str, Path):
        return isinstance(value, str | Path)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, bool, type(None)):
        return type(value) is hint
    if is_list(hint):
        element = (*get_args(hint), Any)[0]
        return OmegaConf.is_list(value) or (isinstance(value, list) and all(fits(item, element) for item in value))
    # A class or a callable is built from a part; plain text in its place is a misspelt option.
    built = inspect.isclass(hint) or get_origin(hint) is not None
    return not (built and (value is None or isinstance(value, str | int | float)))


def is_list(hint: Any) -> bool:
    return (get_origin(hint) or hint) in (list, Sequence)


def described(hint: Any) -> str:
    """A type in words.

    >>> described(int | None), described(Literal["auto", "loop"])
    ('a whole number or null', 'auto or loop')
    """
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(option) for option in get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(str(option) for option in get_args(hint))
    if is_list(hint):
        return "a list"
    return NAMES.get(hint, "an option of its group, chosen with a slash (group/part=option)")
