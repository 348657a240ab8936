"""Config folders of other installed packages: their tasks and algorithms stand beside ours."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from importlib.util import find_spec

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from mlframework.cli.private import accept_plugins, compose_jobs_once
from mlframework.runs.launchers.in_turn import InTurnLauncher
from mlframework.runs.launchers.with_joblib import JoblibLauncher
from mlframework.runs.launchers.with_ray import RayLauncher
from mlframework.runs.launchers.with_submitit import SlurmLauncher, SubmititLauncher
from mlframework.runs.search import OptunaSweeper

__all__ = ["register"]

#: Hydra's plugins of this package; `conf/hydra/` names them.
OF_SWEEPS = (InTurnLauncher, JoblibLauncher, SubmititLauncher, SlurmLauncher, RayLauncher, OptunaSweeper)

#: The group of entry points in which a package names its config folder: `theirs = "their_package.conf"`.
GROUP = "mlframework.conf"


class InstalledConfigs(SearchPathPlugin):
    """Adds the config folders of installed packages behind ours; a broken package is left out, with a warning."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in entry_points(group=GROUP):
            try:
                spec = find_spec(entry.value)
            except Exception as error:  # importing another package may raise anything
                warnings.warn(f"{GROUP}: {entry.name} = {entry.value} cannot be imported ({error})", stacklevel=2)
                continue
            for folder in (spec.submodule_search_locations or ()) if spec else ():
                search_path.append(provider=entry.name, path=f"file://{folder}")


def register() -> None:
    """Makes our launchers and the config folders of installed packages known to Hydra, before it composes anything."""
    if InstalledConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(InstalledConfigs)
    accept_plugins({f"mlframework.runs.{plugin.__name__}": plugin for plugin in OF_SWEEPS})
    compose_jobs_once()
