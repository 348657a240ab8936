"""What a user's own `sample` returns as an episode: converted where that is exact, else refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import InvalidData, UserError
from mlframework.tasks.own_data import as_numbers, require_real

__all__ = ["as_episode"]

WANTED = "sample must return an Episode of Examples, whose x, y and mask are tensors"


def as_episode(drawn: Any, spec: TaskSpec) -> Episode:
    """The episode itself, or one made of tuples, dictionaries, arrays and numbers of other widths.

    Numbers become torch's default dtype: float64 is rounded to float32, unless `torch.set_default_dtype` says float64.
    Without a mask all examples count. Bytes stay bytes: whether they are to be divided by 255 is not known.

    Raises:
        InvalidData: a number is beyond the range of its new dtype, numbers are complex, or a tensor is sparse.
        UserError: it holds something else.
    """
    number = torch.get_default_dtype()
    if type(drawn) is Episode and all(type(part) is Examples and is_plain(part, spec, number) for part in drawn):
        return drawn
    if isinstance(drawn, Mapping) and drawn.keys() == set(Episode._fields):
        drawn = drawn["support"], drawn["query"]
    if not isinstance(drawn, tuple | list) or len(drawn) != 2:
        raise UserError(f"{WANTED}, and returns {described(drawn)}")
    return Episode(*(as_examples(part, name, spec) for part, name in zip(drawn, Episode._fields, strict=True)))


def is_plain(part: Examples, spec: TaskSpec, number: torch.dtype) -> bool:
    """Whether all leaves are tensors of the types that the framework computes with."""
    if not all(isinstance(leaf, Tensor) for leaf in part):
        return False
    if any(leaf.is_complex() or leaf.layout != torch.strided for leaf in part):
        return False
    target = number if spec.kind == "regression" else torch.int64
    return part.x.dtype in (number, torch.int64) and part.y.dtype == target


def as_examples(part: Any, name: str, spec: TaskSpec) -> Examples:
    """One half of an episode."""
    if isinstance(part, Mapping) and {"x", "y"} <= part.keys():
        part = part["x"], part["y"], part.get("mask")
    if not isinstance(part, tuple | list) or len(part) not in (2, 3):
        raise UserError(f"{WANTED}, and {name} is {described(part)}")
    x, y, mask = (*part, None)[:3]
    inputs = in_type(f"{name}.x", x, torch.get_default_dtype())
    if spec.kind == "regression":
        targets = in_type(f"{name}.y", y, torch.get_default_dtype())
        targets = targets.to(torch.get_default_dtype())
        if targets.dim() == 2 and spec.out_features == 1:
            targets = targets.unsqueeze(-1)
    else:
        targets = in_type(f"{name}.y", y, torch.int64)
    if mask is None:
        mask = torch.ones(targets.shape if spec.kind == "sequence" else targets.shape[:2])
    return Examples(inputs, targets, in_type(f"{name}.mask", mask, torch.get_default_dtype()))


def in_type(field: str, values: Any, dtype: torch.dtype) -> Tensor:
    """Numbers of a width that the framework computes with; a tensor on another device stays there."""
    tensor = values if isinstance(values, Tensor) else as_numbers(field, values)
    require_real(field, tensor)
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()  # torch computes little with floats of eight bits
    if tensor.is_floating_point() and not dtype.is_floating_point and not bool((tensor == tensor.round()).all()):
        return tensor  # `check_episode` names the type
    if tensor.is_floating_point() or (tensor.dtype == torch.bool and dtype.is_floating_point):
        return in_range(field, tensor, dtype)
    return tensor if tensor.dtype == torch.uint8 and dtype.is_floating_point else in_range(field, tensor, torch.int64)


def in_range(field: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in another width, where none of them becomes infinite or another whole number."""
    rounded = tensor.to(dtype)
    if dtype.is_floating_point and (beyond := rounded.isinf() & ~tensor.isinf()).any():
        why = f"is beyond {dtype}: scale the data, or call torch.set_default_dtype(torch.float64)"
        raise InvalidData(field, f"{tensor[beyond][0].item():g}", why)
    if not dtype.is_floating_point and (beyond := beyond_int64(tensor, rounded)).any():
        raise InvalidData(field, f"{tensor.double()[beyond][0].item():g}", f"is beyond {dtype}")
    return rounded


def beyond_int64(tensor: Tensor, rounded: Tensor) -> Tensor:
    """Which numbers are too large for int64, in which they are `rounded`."""
    if tensor.is_floating_point():
        return (tensor >= 2.0**63) | (tensor < -(2.0**63))
    return (rounded < 0) if tensor.dtype == torch.uint64 else torch.zeros_like(rounded, dtype=torch.bool)


def described(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{size}"
