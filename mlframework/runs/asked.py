"""Tasks that a trained run is asked to be judged on: its own with other settings, or those of another option."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.runs.check_config import check_config, given, is_part, located, parameters
from mlframework.runs.overrides import key_of
from mlframework.tasks.data_folder import data_folder
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["ANY_N_WAY", "Asked", "asked_task", "check_divided_alike", "combinations", "refusal"]

#: Settings of a run's task that hold for another option too, as far as it has them and the user names no others.
SIZES = ("n_way", "k_shot", "k_query", "image_size", "channels")

#: Presets whose weights are the same for any number of classes.
ANY_N_WAY = (
    *("prototypes", "prototypes_cosine", "matching", "matching_fce", "relation", "conditional_neural_process"),
    *("hypernetwork", "proto_maml", "ridge", "logistic", "svm", "svm_rbf", "svm_one_vs_rest", "deep_kernel"),
)

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """Tasks that a run is judged on in place of its own."""

    task: DictConfig  # the config of the task
    typed: str  # the overrides that lead there


def combinations(typed: Sequence[str]) -> list[list[str]]:
    """The overrides of each combination, for overrides that may have several values: `task.k_shot=1,5`.

    >>> combinations(["task.n_way=20", "task.k_shot=1,5"])
    [['task.n_way=20', 'task.k_shot=1'], ['task.n_way=20', 'task.k_shot=5']]
    """
    return [list(each) for each in itertools.product(*map(with_one_value, typed))]


def with_one_value(typed: str) -> list[str]:
    """The overrides that an override with several values stands for."""
    override = parsed(typed)
    if not override.is_sweep_override():
        return [typed]
    return [f"{typed.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]


def parsed(typed: str) -> Override:
    return OverridesParser.create().parse_override(typed)


def asked_task(config: DictConfig, choice: str | None, typed: Sequence[str]) -> DictConfig:
    """The config of the task that overrides ask for, checked.

    Another option, `task=omniglot`, has the sizes of the run's own task. Another part, `task/source=movielens`, leaves
    the other settings of the run as they are.

    Args:
        config: of the run.
        choice: the option that the run's task came from; None: unknown.
        typed: overrides of the task and of its groups, each with one value.
    """
    groups = [each for each in typed if "." not in key_of(each)]
    settings = [each for each in typed if each not in groups]
    task: DictConfig = config.task.copy()
    with open_dict(task):
        if any(key_of(each) == "task" for each in groups):
            sizes = {name: task[name] for name in SIZES if name in task}
            task = config_of_option(groups)
            task.update({name: size for name, size in sizes.items() if name in task})
        elif groups:
            if choice is None:
                raise UserError(f"{groups[0]}: the run does not say which option its task was: name it, as in task=...")
            if not re.fullmatch(r"[\w/-]+", choice):  # a file elsewhere, or an interpolation
                raise UserError(f"choices.json: task={choice[:80]}: is no name of an option")
            other = config_of_option([f"task={choice}", *groups])
            for path in (key_of(each).removeprefix("task/").replace("/", ".") for each in groups):
                OmegaConf.update(task, path, OmegaConf.select(other, path), merge=False)
    for each in settings:
        set_value(task, each)
    check_config(OmegaConf.create({"task": task}), settings={})
    return task


def config_of_option(groups: Sequence[str]) -> DictConfig:
    """The config of a task's option, with its defaults."""
    found = compose("train", list(groups))
    return OmegaConf.create(OmegaConf.to_container(found.task, resolve=True))  # type: ignore[return-value]


def set_value(task: DictConfig, typed: str) -> None:
    """Sets a value; a key that is not there is refused, unless it has a `+` in front."""
    key = key_of(typed)
    path, name = key.split(".")[1:-1], key.split(".")[-1]
    part = OmegaConf.select(task, ".".join(path)) if path else task
    there = [str(each) for each in part or () if not str(each).startswith("_")] if OmegaConf.is_dict(part) else []
    if not typed.startswith("+") and name not in there:
        raise UserError(f"{typed}: there is no {key}{nearest(name, there)}; there are {', '.join(there)}")
    value = parsed(typed).value()
    with open_dict(task):
        OmegaConf.update(task, key.removeprefix("task."), getattr(value, "text", value), force_add=True)


def check_divided_alike(own: DictConfig, asked: DictConfig) -> None:
    """Refuses a task of the same data whose test tasks may hold data that the run was trained on.

    A task of the user's own that does not say what divides its data gets a warning.
    """
    if not are_related(located(own._target_), located(asked._target_)) or data_of(own) != data_of(asked):
        return
    for key, ours, theirs in shared_parts(own, asked):
        classes = located(ours._target_), located(theirs._target_)
        dividing = {name: None for each in classes for name in getattr(each, "divided_by", ())}
        for name in dividing:
            if (value := setting(ours, name)) != (other := setting(theirs, name)):
                why = f"says which data are trained on, and the run has {value}: they might be among the tests"
                raise InvalidValue(f"{key}.{name}", other, why)
    if not is_declared(located(asked._target_)):
        warn_of_changes(own, asked)


def shared_parts(own: DictConfig, asked: DictConfig) -> Iterator[tuple[str, DictConfig, DictConfig]]:
    """The configs of both tasks, and those of their sources, with their keys."""
    yield "task", own, asked
    if is_part(own.get("source")) and is_part(asked.get("source")):
        yield "task.source", own.source, asked.source


def are_related(one: Any, other: Any) -> bool:
    """Whether two names of a `_target_` lead to one object, or to a class and a subclass of it."""
    if isinstance(one, type) and isinstance(other, type):
        return issubclass(one, other) or issubclass(other, one)
    return bool(one is other)


def data_of(task: DictConfig) -> tuple[object, ...]:
    """What two tasks of the same data share: the real paths, or all settings of a source without a path."""
    source = task.get("source")
    if is_part(source) and source.get("path") is not None:
        source = source._target_, real_path(source.path)
    path = task.get("path")
    return None if path is None else real_path(path), real_path(data_folder(task.get("data_dir"))), source


def real_path(path: str | Path) -> str:
    return os.path.realpath(os.path.expanduser(path))


def setting(part: DictConfig, name: str) -> Any:
    """The value of a setting, or the constructor's default."""
    if name in part:
        return part[name]
    parameter = parameters(located(part._target_)).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def is_declared(target: Any) -> bool:
    """Whether a task declares the settings that divide its data; those of this package do."""
    classes = target.__mro__ if isinstance(target, type) else ()
    own = [each for each in classes if each is not TaskDistribution and "divided_by" in vars(each)]
    return bool(own) or str(getattr(target, "__module__", "")).startswith("mlframework.")


def warn_of_changes(own: DictConfig, asked: DictConfig) -> None:
    """Names the settings by which the training data of a user's own task might be among the tests."""
    names = dict.fromkeys([*given(own), *given(asked)])
    changed = [name for name in names if name not in SIZES and setting(own, name) != setting(asked, name)]
    if named := ", ".join(f"task.{name}" for name in changed):
        task = str(asked._target_).rpartition(".")[2]
        log.warning("%s: training data might be among the tests: %s.divided_by does not say", named, task)


def refusal(asked: str, algorithm: str, weight: str, own: TaskSpec, found: TaskSpec) -> str:
    """Why the weights of a run do not fit a task, and which algorithms' would.

    Args:
        asked: the overrides.
        weight: the first one that does not fit.
        own, found: the specs of the run's task and of the other.
    """
    if own.kind != found.kind:
        return f"{asked}: is a {found.kind}, and the run has learned a {own.kind}"
    if own.x_shape != found.x_shape:
        why = f"inputs of shape {own.x_shape}, and these are {found.x_shape}"
        conv4 = "; base_layer=conv4 with base_layer.downsample=stride takes images of any size"
        return f"{asked}: {weight} is for {why}{conv4 if len(own.x_shape) == 3 else ''}"
    if own.kind == "classification" and own.out_features != found.out_features:
        why = f"algorithm={algorithm} has learned {own.out_features} classes ({weight})"
        others = f"these take any number of classes: {', '.join(ANY_N_WAY)}"
        return f"{asked}: {why}, and these tasks have {found.out_features}; {others}"
    return f"{asked}: {weight} has another shape for these tasks"
