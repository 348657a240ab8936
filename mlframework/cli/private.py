"""Every private name of Hydra that this package uses; no other file names one. Torch's are in `backend/private.py`.

Two files, so that `--help` and completion do not import torch: 0.2 s of processor time instead of 1.4 s. Tried with
hydra-core 1.3.8.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser  # without it an unknown flag prints a page of usage before its line
from hydra.core.object_type import ObjectType

__all__ = ["get_args_parser", "list_options_quickly"]


def list_options_quickly() -> None:
    """A patch for `--help`: for every group Hydra copies all configs it knows, two thirds of the time it takes.

    hydra-core 1.3.8 does so still. Without the patch `--help` is slower, and prints the same.
    """

    def quick(loader: ConfigLoaderImpl, group_name: str, results_filter: Any = ObjectType.CONFIG, **_: Any) -> Any:
        return loader.repository.get_group_options(group_name, results_filter)

    ConfigLoaderImpl.get_group_options = quick  # type: ignore[assignment, method-assign]
