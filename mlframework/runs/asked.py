"""Tasks that a trained run is asked to be judged on: its own with other settings, or those of another option."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.runs.check_config import check_config, located

__all__ = ["ANY_N_WAY", "Asked", "asked_task", "check_divided_alike", "combinations", "refusal"]

#: Settings of a run's task that hold for another option too, as far as it has them and the user names no others.
SIZES = ("n_way", "k_shot", "k_query", "image_size", "channels")

#: Presets whose weights are the same for any number of classes.
ANY_N_WAY = (
    *("prototypes", "prototypes_cosine", "matching", "matching_fce", "relation", "conditional_neural_process"),
    *("hypernetwork", "proto_maml", "ridge", "logistic", "svm", "svm_rbf", "svm_one_vs_rest", "deep_kernel"),
)

#: Settings without which two configs of a task distribution are about other data.
DATA = ("source", "path", "data_dir")


class Asked(NamedTuple):
    """Tasks that a run is judged on in place of its own."""

    task: DictConfig  # the config of the task
    typed: str  # the overrides that lead there


def combinations(typed: Sequence[str]) -> list[list[str]]:
    """The overrides of each combination, for overrides that may have several values: `task.k_shot=1,5`.

    >>> combinations(["task.n_way=20", "task.k_shot=1,5"])
    [['task.n_way=20', 'task.k_shot=1'], ['task.n_way=20', 'task.k_shot=5']]
    """
    return [list(each) for each in itertools.product(*map(values, typed))]


def values(typed: str) -> list[str]:
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
            task = composed(groups)
            task.update({name: size for name, size in sizes.items() if name in task})
        elif groups:
            if choice is None:
                raise UserError(f"{groups[0]}: the run does not say which option its task was: name it, as in task=...")
            if not re.fullmatch(r"[\w/-]+", choice):  # a file elsewhere, or an interpolation
                raise UserError(f"choices.json: task={choice[:80]}: is no name of an option")
            other = composed([f"task={choice}", *groups])
            for path in (key_of(each).removeprefix("task/").replace("/", ".") for each in groups):
                OmegaConf.update(task, path, OmegaConf.select(other, path), merge=False)
    for each in settings:
        set_value(task, each)
    check_config(OmegaConf.create({"task": task}), settings={})
    return task


def composed(groups: Sequence[str]) -> DictConfig:
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


def key_of(typed: str) -> str:
    return typed.partition("=")[0].lstrip("+")


def check_divided_alike(own: DictConfig, asked: DictConfig) -> None:
    """Refuses a task of the same data whose test tasks may hold data that the run was trained on."""
    if own._target_ != asked._target_ or any(own.get(name) != asked.get(name) for name in DATA):
        return
    for name in located(own._target_).divided_by:
        if own.get(name) != asked.get(name):
            why = f"says which data train, and the run has {own.get(name)}: its training data would be among the tests"
            raise InvalidValue(f"task.{name}", asked.get(name), why)


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
