"""Resuming a run with other settings: the new overrides are applied and recorded, or refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple, cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mlframework.errors import InvalidValue, UserError
from mlframework.files import leaves, write_json
from mlframework.reading import read_json
from mlframework.runs.overrides import CHANGEABLE, OF_THIS_PROCESS, key_of
from mlframework.runs.run_folder import RunFolder

__all__ = ["Resumed", "changed_since", "resumed"]

#: Stands for a key that a config does not have.
ABSENT = "(absent)"


class Composed(NamedTuple):
    """The config that overrides lead to: its leaves by dotted key, resolved, and the option of each config group."""

    values: dict[str, Any]
    choices: dict[str, Any]


class Resumed(NamedTuple):
    """A run that goes on, with its settings of now; `changes` are `(before, now)` by key, `typed` the new overrides."""

    config: DictConfig
    overrides: list[str]
    choices: dict[str, str]
    changes: dict[str, tuple[Any, Any]]
    typed: list[str]

    def record(self, folder: RunFolder, step: int) -> None:
        """Adds the new overrides to the record of the run, with the outer step after which they took effect."""
        if not self.typed:
            return
        file = folder.path / "resumed.json"
        before = read_json(file, list) if os.path.lexists(file) else []
        changes = {key: list(pair) for key, pair in self.changes.items()}
        write_json(file, [*before, {"step": step, "overrides": self.typed, "changes": changes}])
        folder.record_settings(changed(folder.config(), self.changes), self.overrides, self.choices)


def resumed(folder: RunFolder, overrides: Sequence[str]) -> Resumed:
    """The run in a folder with the overrides that the user types when it goes on.

    The overrides of the start are composed with and without the new ones. The difference is the user's change, with
    group choices, experiments and interpolations. A change of a setting that the run has learned with is refused.
    """
    if not folder.holds_run:
        raise UserError(f"resume=true: there is no run in {folder.key}={folder.path}")
    stored, started = folder.config(), folder.overrides()
    stored.resume, stored.run_dir = True, str(folder.path)
    typed = [o for o in overrides if key_of(o) not in OF_THIS_PROCESS and o not in started]
    if not typed:
        return Resumed(stored, started, folder.choices(), {}, [])
    before = composed(folder.overrides(to_compose=True))
    try:
        now = composed(merged(started, typed))
    except HydraException as error:  # an override does not fit the others, such as a setting of another base layer
        override = next((o for o in typed if key_of(o) in before.choices), typed[0])
        said = str(error).splitlines()[0]
        why = f"does not go with the overrides of this run ({said}); resume=true cannot change it"
        raise InvalidValue(key_of(override), override.partition("=")[2], why) from error
    changes = difference(before.values, now.values)
    for key in changes:
        if not f"{key}.".startswith(tuple(f"{allowed}." for allowed in CHANGEABLE)):
            raise refusal(key, changes[key], typed, started, before)
    choices = {**folder.choices(), **{g: o for g, o in now.choices.items() if before.choices.get(g) != o}}
    return Resumed(changed(stored, changes), merged(started, typed), choices, changes, typed)


def merged(started: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The overrides of the start, without those whose keys were typed anew, and then the new ones."""
    anew = {key_of(override) for override in typed}
    return [*(override for override in started if key_of(override) not in anew), *typed]


def composed(overrides: Sequence[str]) -> Composed:
    """Composes `conf/train.yaml` with overrides, in Hydra as the command has set it up, if one has."""
    initialised = GlobalHydra.instance().is_initialized()
    with nullcontext() if initialised else initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", list(overrides), return_hydra_config=True)
    own = OmegaConf.masked_copy(config, [str(name) for name in config if name not in ("hydra", *OF_THIS_PROCESS)])
    values = cast(dict[str, Any], OmegaConf.to_container(own, resolve=True))
    choices = {g: o for g, o in config.hydra.runtime.choices.items() if not g.startswith("hydra/")}
    return Composed(dict(leaves(values)), choices)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`(before, now)` of the keys whose values differ."""
    pairs = {key: (before.get(key, ABSENT), now.get(key, ABSENT)) for key in sorted(before.keys() | now.keys())}
    return {key: (then, value) for key, (then, value) in pairs.items() if then != value}


def changed_since(folder: RunFolder, config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """`(then, now)` of the settings in which a run differs from a config, of those that change what is learned."""
    configs = (OmegaConf.to_container(each, resolve=True) for each in (folder.config(), config))
    then, now = (dict(leaves(cast(dict[str, Any], each))) for each in configs)
    left_out = tuple(f"{name}." for name in (*CHANGEABLE, *OF_THIS_PROCESS))
    return {key: pair for key, pair in difference(then, now).items() if not f"{key}.".startswith(left_out)}


def changed(config: DictConfig, changes: Mapping[str, tuple[Any, Any]]) -> DictConfig:
    for key, (_, now) in sorted(changes.items(), key=lambda item: item[1][1] != ABSENT):  # removed keys make room first
        parent, _, name = key.rpartition(".")
        if now == ABSENT:
            (OmegaConf.select(config, parent) if parent else config).pop(name, None)
        else:
            OmegaConf.update(config, key, now, force_add=True)
    return config


def refusal(
    key: str, change: tuple[Any, Any], typed: Sequence[str], started: Sequence[str], before: Composed
) -> InvalidValue:
    """Which override names a key that cannot change, or else changes it first, and why that is refused."""
    named = (o for o in typed if f"{key}.".startswith(f"{key_of(o).replace('/', '.')}."))
    changing = (o for o in typed if key in difference(before.values, composed(merged(started, [o])).values))
    override = next(chain(named, changing))
    name, value = key_of(override), override.partition("=")[2]
    if name in before.choices or key == name:
        then = before.choices.get(name, change[0])
        shown = "null" if then is None else "none" if then == ABSENT else then
        return InvalidValue(name, value, f"this run was started with {shown}; resume=true cannot change it")
    then, now = change
    shorter = isinstance(then, int | float) and isinstance(now, int | float) and now < then
    remedy = f"add {key}={then} to keep it and end early, or start a new run" if shorter else "start a new run"
    return InvalidValue(name, value, f"would change {key} from {then} to {now} too, and resume=true cannot: {remedy}")
