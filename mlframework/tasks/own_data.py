"""A user's own arrays as a task's inputs and targets: converted where that is exact, else refused in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidData

__all__ = ["as_class_ids", "as_inputs", "as_numbers", "as_values", "require_finite"]

#: The fix for labels that are no class ids.
ANY_LABELS = "FewShotClassifier takes labels of any kind"


def as_inputs(x: Any, spec: TaskSpec) -> Tensor:
    """Inputs `[n, *x_shape]` from numbers of any type, as arrays, tensors or nests of them; tokens of any length.

    Flat rows become images, numbers become rows where a row has one number, and one image becomes a batch of one.
    Images of eight bits are scaled to [0, 1], as when they are drawn.
    """
    tensor, shape = as_numbers("x", x), tuple(spec.x_shape)
    if spec.kind == "sequence":
        return as_tokens(tensor, spec)
    eight_bits = tensor.dtype == torch.uint8 and len(shape) == 3
    tensor = in_shape(tensor, shape)
    return tensor.float() / 255 if eight_bits else tensor.double()


def as_tokens(tensor: Tensor, spec: TaskSpec) -> Tensor:
    """Tokens `[n, length]`, each below the size of the vocabulary."""
    if tensor.dim() != 2:
        raise wrong_shape(tensor, ("n", "length"))
    return whole("x", tensor, spec.out_features)


def in_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same numbers as `[n, *shape]`."""
    given = tuple(tensor.shape)
    if given[1:] == shape and given:
        return tensor
    one_number = shape == (1,) and tensor.dim() == 1
    flat = len(shape) > 1 and given[1:] == (math.prod(shape),)
    one_image = len(shape) > 1 and given == shape
    if one_number or flat or one_image:
        return tensor.reshape(-1, *shape)
    raise wrong_shape(tensor, ("n", *shape))


def wrong_shape(tensor: Tensor, wanted: tuple[int | str, ...]) -> InvalidData:
    return InvalidData("x", f"an array of shape {tuple(tensor.shape)}", f"must be of shape {wanted}")


def as_numbers(field: str, values: Any) -> Tensor:
    """Numbers as a tensor on the CPU; eight bits stay eight bits, other types become 64 bits wide.

    Raises:
        InvalidData: there are texts, complex numbers, missing values, or rows of different lengths.
    """
    if isinstance(values, Sequence) and len(values) and all(isinstance(each, Tensor) for each in values):
        values = stacked(field, values)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.dtype in (torch.bfloat16, torch.half):
            values = values.float()
        values = values.numpy()
    array = as_array(field, values)
    wide = {"b": np.bool_, "f": np.float64, "i": np.int64, "u": np.int64}[array.dtype.kind]
    kept = np.uint8 if array.dtype == np.uint8 else wide
    return torch.from_numpy(np.array(array, dtype=kept, order="C"))  # a copy, which torch may write to


def stacked(field: str, values: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(each.shape) for each in values}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise InvalidData(field, f"tensors of shapes {one} and {other}", "must be of one shape")
    return torch.stack([each.detach().cpu() for each in values])


def as_array(field: str, values: Any) -> np.ndarray:
    """An array of numbers."""
    if hasattr(values, "toarray"):
        raise InvalidData(field, "a sparse matrix", f"must be dense: {field}.toarray()")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidData(field, "rows of different lengths", "must be an array of numbers") from error
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidData(field, f"an array of {kind_of(array)}", "must be an array of numbers") from error
    if array.dtype.kind == "c":
        raise InvalidData(field, "complex numbers", "must be real: Complex data not supported")
    if array.dtype.kind not in "bfiu":
        raise InvalidData(field, f"an array of {kind_of(array)}", "must be an array of numbers")
    return array


def kind_of(array: np.ndarray) -> str:
    """The type of the first value that is no number, in words."""
    for value in array.flat:
        if not isinstance(value, int | float | np.number):
            return {"str": "texts", "str_": "texts", "NoneType": "None"}.get(type(value).__name__, type(value).__name__)
    return str(array.dtype)


def require_finite(field: str, values: Tensor) -> None:
    """Refuses NaN and infinity, with the first row that holds one."""
    wrong = ~torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else ~torch.isfinite(values)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        what = "NaN" if values[row].isnan().any() else "infinity"
        raise InvalidData(field, what, f"stands in row {row}: fill it in, or leave the row out")


def as_class_ids(y: Any, spec: TaskSpec) -> Tensor:
    """Class ids `[n]`, from whole numbers of any type or one-hot rows; of a sequence the tokens `[n, length]`."""
    try:
        tensor = as_numbers("y", y)
    except InvalidData as error:
        raise InvalidData("y", error.value, f"must be class ids 0...{spec.out_features - 1}: {ANY_LABELS}") from error
    classes, dims = spec.out_features, 2 if spec.kind == "sequence" else 1
    if dims == 1 and tensor.dim() == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if dims == 1 and tensor.dim() == 2 and tensor.shape[1] == classes and is_one_hot(tensor):
        tensor = tensor.double().argmax(1)
    if tensor.dim() != dims:
        raise InvalidData("y", f"an array of shape {tuple(tensor.shape)}", "must hold a class id for each input")
    return whole("y", tensor, classes)


def is_one_hot(rows: Tensor) -> bool:
    return bool(((rows == 0) | (rows == 1)).all() and (rows.double().sum(1) == 1).all())


def whole(field: str, tensor: Tensor, count: int) -> Tensor:
    """Whole numbers from 0 to below `count`."""
    require_finite(field, tensor)
    ids = tensor.long()
    wrong = (ids != tensor) | (ids < 0) | (ids >= count)
    if wrong.any():
        value = tensor[wrong][0].item()
        hint = f": {ANY_LABELS}" if field == "y" else ""
        raise InvalidData(field, value, f"must be a whole number from 0 to {count - 1}{hint}")
    return ids


def as_values(y: Any, spec: TaskSpec) -> Tensor:
    """Targets `[n, out_features]` of a regression, of any numeric type; a column may be flat."""
    tensor, width = as_numbers("y", y), spec.out_features
    if width == 1 and tensor.dim() == 1:
        tensor = tensor[:, None]
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise InvalidData("y", f"an array of shape {tuple(tensor.shape)}", f"must be of shape {('n', width)}")
    return tensor.double()
