"""Every private name of Hydra that this package uses; no other file names one. Torch's are in `backend/private.py`.

Two files, so that `--help` and completion do not import torch: 0.2 s of processor time instead of 1.4 s. Tried with
hydra-core 1.3.8.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

__all__ = ["hydra_parser", "list_options_quickly"]


def hydra_parser() -> ArgumentParser:
    """The parser of Hydra's flags; without it an unknown flag prints a page of usage before its one line."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser()


def list_options_quickly() -> None:
    """A patch for `--help`: for every group Hydra copies all configs it knows, two thirds of the time it takes.

    hydra-core 1.3.8 does so still. Without the patch `--help` is slower, and prints the same.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.object_type import ObjectType

    slow = ConfigLoaderImpl.get_group_options

    def quick(loader: ConfigLoaderImpl, group_name: str, results_filter: Any = ObjectType.CONFIG, **rest: Any) -> Any:
        if rest:
            return slow(loader, group_name, results_filter, **rest)
        return loader.repository.get_group_options(group_name, results_filter)

    ConfigLoaderImpl.get_group_options = quick  # type: ignore[assignment, method-assign]
