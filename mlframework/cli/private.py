"""Every private name of Hydra that this package uses; no other file names one. Torch's are in `backend/private.py`.

Two files, so that `--help` and completion do not import torch: 0.2 s of processor time instead of 1.4 s. Tried with
hydra-core 1.3.8.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser  # without it an unknown flag prints a page of usage before its line
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin
from hydra.types import RunMode
from omegaconf import DictConfig

from mlframework.cli.help import commented, groups_of

__all__ = ["accept_plugins", "explain_help", "get_args_parser"]


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
