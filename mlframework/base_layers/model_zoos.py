"""Architectures of packages of pretrained networks, without their weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.files import KeepsArguments

__all__ = ["Timm", "Torchvision"]

#: How the names of arguments begin by which timm and torchvision load weights.
LOADING = ("checkpoint", "pretrained", "weights", "cache_dir")


class Timm(KeepsArguments):
    """A network of timm, by its name there, such as `resnet18`, without weights.

    Args:
        name: as `timm.list_models()` lists it.
        options: further arguments of `timm.create_model`, without those that load weights.
    """

    def __init__(self, name: str, *, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.options = name, without_weights(options or {})

    def __call__(self) -> nn.Module:
        timm = imported("timm")
        return built(self.name, timm.list_models(), lambda: timm.create_model(self.name, **self.options))


class Torchvision(KeepsArguments):
    """A network of torchvision, by its name there, such as `resnet18`, without weights.

    Args:
        name: as `torchvision.models.list_models()` lists it.
        options: further arguments of `torchvision.models.get_model`, without those that load weights.
    """

    def __init__(self, name: str, *, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.options = name, without_weights(options or {})

    def __call__(self) -> nn.Module:
        models = imported("torchvision.models")
        return built(self.name, models.list_models(), lambda: models.get_model(self.name, weights=None, **self.options))


def without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options; those are refused by which the packages download weights, or unpickle a file of them."""
    for name in options:
        if name.startswith(LOADING):
            why = "would load weights by code of the package, which may run a file: take base_layer.weights=FILE"
            raise InvalidValue("options", name, why)
    return dict(options)


def imported(name: str) -> ModuleType:
    """A module of an optional package; a `UserError` says how to install the package."""
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        needs = f"needs the package {error.name}: pip install 'mlframework[pretrained]'"
        raise UserError(f"base_layer/network={package} {needs}") from error
    except (ImportError, RuntimeError, OSError) as error:  # torchvision's operators are built for one build of torch
        why = "install the build of torchvision that goes with this torch, from the same index"
        raise UserError(f"base_layer/network={package} cannot be imported ({error}): {why}") from error


def built(name: str, known: list[str], build: Callable[[], nn.Module]) -> nn.Module:
    if name.partition(".")[0] not in known:
        raise InvalidValue("name", name, f"is no network of this package{nearest(name, known)}")
    return build()
