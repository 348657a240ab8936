"""Every private name of Hydra and OmegaConf that this package uses; no other file names one.

Torch's are in `backend/private.py`. Two files, so that `--help` and completion do not import torch: 0.2 s of processor
time instead of 1.4 s. Tried with hydra-core 1.3.8.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import hydra._internal.config_loader_impl as composing
import hydra._internal.hydra as starting
import omegaconf.base as resolving
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser  # without it an unknown flag prints a page of usage before its line
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.grammar_parser import OmegaConfGrammarParser

from mlframework.cli.help import commented, groups_of

__all__ = ["accept_plugins", "compose_jobs_once", "explain_help", "get_args_parser"]

create_defaults_list, parse_anew = composing.create_defaults_list, resolving.parse

#: The most choices of options that a sweep remembers: 0.3 MB each.
MOST_COMPOSED = 32


def accept_plugins(plugins: Mapping[str, type[Plugin]]) -> None:
    """Lets `_target_: <name>` in `hydra.launcher` and `hydra.sweeper` name these classes.

    Hydra takes launchers and sweepers only from a package `hydra_plugins`, which it imports at each start. Without the
    patch `-m` stops at "not the hydra_plugins package".
    """
    Plugins.instance().class_name_to_class |= plugins
    hydras_own = Plugins.is_in_toplevel_plugins_module

    def accepted(name: str) -> bool:
        return name in plugins or hydras_own(name)

    Plugins.is_in_toplevel_plugins_module = staticmethod(accepted)  # type: ignore[assignment, method-assign]


def compose_jobs_once() -> None:
    """A patch for sweeps: what jobs have in common is read, parsed and merged once.

    Hydra reads some thirty files for every job, twice: before the sweep and in the job. With the patch jobs with the
    same options of all groups read and merge them once. Before the sweep, jobs that differ in numbers alone are
    composed once; and a text with an interpolation is parsed once, wherever it stands.
    """
    for remembered in (SweepLoader.composed, SweepLoader.repositories):
        remembered.clear()  # files may have changed since an earlier command of this process
    starting.ConfigLoaderImpl = SweepLoader  # type: ignore[misc]
    Sweeper.validate_batch_is_legal = compose_one_of_each  # type: ignore[method-assign]
    resolving.parse = parse


@lru_cache(maxsize=10_000)
def parse(text: str) -> OmegaConfGrammarParser.ConfigValueContext:
    """In place of OmegaConf's own function: the tree of a text, which nothing changes."""
    return parse_anew(text)


def compose_one_of_each(self: Sweeper, batch: Sequence[Sequence[str]]) -> None:
    """In place of Hydra's own method, which composes every job: of jobs that differ in numbers alone only the first.

    Composing looks at keys and options; numbers are checked in the job.
    """
    assert self.hydra_context is not None and self.config is not None
    loader = self.hydra_context.config_loader
    assert isinstance(loader, ConfigLoaderImpl)

    @cache
    def kind(text: str) -> str:
        """What an override decides: all of it, or for a number the key alone."""
        (override,) = OverridesParser.create().parse_overrides([text])
        is_number = isinstance(override.value(), int | float) and not override.is_hydra_override()
        return text.partition("=")[0] if is_number and sets_value(loader.repository, override) else text

    for overrides in {tuple(map(kind, overrides)): overrides for overrides in reversed(batch)}.values():
        loader.load_sweep_config(self.config, list(overrides))


class SweepLoader(ConfigLoaderImpl):
    """Hydra's own, which remembers for the jobs of a sweep all that their options decide; values are set afterwards.

    A launcher's worker is sent the loader, and remembers for itself.
    """

    #: By the options and the folders of configs: the files to merge, and what they make together.
    composed: ClassVar[dict[Any, tuple[DefaultsList, DictConfig]]] = {}

    #: By the first file, as `train`, and the folders of configs: these with those that the first file adds.
    repositories: ClassVar[dict[Any, CachingConfigRepository]] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        composing.create_defaults_list = self.defaults_of  # type: ignore[assignment]
        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        finally:
            composing.create_defaults_list = create_defaults_list

    def defaults_of(
        self, repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **settings: bool
    ) -> DefaultsList:
        """In place of Hydra's own function: only overrides of groups decide which files are merged."""
        values = [override for override in overrides_list if sets_value(repo, override)]
        groups = [override for override in overrides_list if not any(override is value for value in values)]
        key = (config_name, folders_of(repo), *(override.input_line for override in groups), *settings.items())
        if key not in self.composed:
            found = create_defaults_list(repo, config_name, groups, **settings)
            if len(self.composed) >= MOST_COMPOSED:
                self.composed.pop(next(iter(self.composed)))
            self.composed[key] = found, super()._compose_config_from_defaults_list(found.defaults, repo)
        return replace(self.composed[key][0], config_overrides=values)

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        """Copies the folders of configs once, with those that the first file adds; an override may add others."""
        if any("hydra.searchpath" in override for override in overrides):
            return super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        key = config_name, folders_of(self.repository)
        if key not in self.repositories:
            _, self.repositories[key] = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        repo = copy.copy(self.repositories[key])
        repo.cache = {}  # Hydra changes what it has read
        return OverridesParser.create().parse_overrides(overrides), repo

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: IConfigRepository) -> DictConfig:
        for found, config in self.composed.values():
            if found.defaults is defaults:
                return copy.deepcopy(config)
        return super()._compose_config_from_defaults_list(defaults, repo)


def folders_of(repo: IConfigRepository) -> tuple[tuple[str, str], ...]:
    return tuple((source.scheme(), source.path) for source in repo.get_sources())


def sets_value(repo: IConfigRepository, override: Override) -> bool:
    """Whether Hydra takes an override for that of a value, not of a group's option."""
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)


def explain_help() -> None:
    """A patch for `--help`: keys stand with their comments, and algorithms by family.

    Without it `--help` shows bare keys. It also takes a third of the time, as Hydra copies all configs for every group.
    """
    Hydra.get_help = get_help  # type: ignore[method-assign]


def get_help(self: Hydra, help_cfg: DictConfig, cfg: DictConfig, args_parser: Any, resolve: bool) -> str:
    """In place of Hydra's own method."""
    loader, chosen = self.config_loader, HydraConfig.get()
    assert isinstance(loader, ConfigLoaderImpl)
    names = [group for group in self.list_all_config_groups() if not f"{group}/".startswith("hydra/")]
    options = {g: sorted(loader.repository.get_group_options(g, ObjectType.CONFIG)) for g in sorted(names)}
    algorithms = {name: text_of(loader, f"algorithm/{name}") for name in options.get("algorithm", [])}
    defaults = loader.compute_defaults_list(chosen.job.config_name, list(chosen.overrides.task), RunMode.RUN).defaults
    texts = [(each.package or "", text_of(loader, each.config_path or "")) for each in defaults]
    return string.Template(help_cfg.template).substitute(
        FLAGS_HELP=self.format_args_help(args_parser),
        APP_CONFIG_GROUPS=groups_of(options, algorithms),
        CONFIG=commented(cfg, [(package, text) for package, text in texts if text], resolve=resolve),
    )


def text_of(loader: ConfigLoaderImpl, name: str) -> str:
    """The yaml of a config in one of our folders, a plug-in's or the user's; '' for one of Hydra's."""
    for source in loader.get_sources():
        if source.scheme() == "pkg" and not source.path.startswith("hydra"):
            place = files(source.path).joinpath(f"{name}.yaml")
        elif source.scheme() == "file":
            place = Path(source.path) / f"{name}.yaml"
        else:
            continue
        if place.is_file():
            return place.read_text(encoding="utf-8")
    return ""
