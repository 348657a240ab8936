"""A user's own arrays as a task's inputs and targets: converted where that is exact, else refused in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import TaskSpec
from mlframework.errors import InvalidData

__all__ = ["as_class_ids", "as_inputs", "as_numbers", "as_values", "require_finite", "require_real"]

#: Told beside labels that are no class ids.
ANY_LABELS = "FewShotClassifier takes labels of any kind"
#: Why complex numbers are refused; scikit-learn looks for its last words.
COMPLEX = "complex numbers", "must be real: Complex data not supported"
MOST_WHOLE = torch.iinfo(torch.int64).max


def as_inputs(x: Any, spec: TaskSpec) -> Tensor:
    """Inputs `[n, *x_shape]` from numbers of any type, as arrays, tensors or nests of them; tokens of any length.

    Flat rows become images, numbers become rows where a row has one number, and one image becomes a batch of one.
    Images of eight bits are scaled to [0, 1], as when they are drawn.
    """
    tensor, shape = as_numbers("x", x), tuple(spec.x_shape)
    if spec.kind == "sequence":
        return as_tokens(tensor, spec)
    eight_bits = tensor.dtype == torch.uint8 and len(shape) == 3
    if len(shape) == 3:
        require_one_scale(x)
    tensor = in_shape(tensor, shape)
    return tensor.float() / 255 if eight_bits else tensor.double()


def require_one_scale(x: Any) -> None:
    """Refuses bytes beside other numbers in a list of images: bytes are divided by 255, the others are not."""
    types = (
        {str(each.dtype).removeprefix("torch.") for each in x if hasattr(each, "dtype")}
        if isinstance(x, Sequence)
        else set()
    )
    if len(types) > 1 and "uint8" in types:
        raise InvalidData("x", f"images of types {' and '.join(sorted(types))}", "must be of one type")


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

    A missing value, `None` or masked, becomes NaN: some tasks fill it in, and `require_finite` refuses it for the rest.

    Raises:
        InvalidData: there are texts, complex numbers, whole numbers beyond int64, or rows of different lengths.
    """
    if isinstance(values, Sequence) and len(values) and all(isinstance(each, Tensor) for each in values):
        values = stacked(field, values)
    array = as_array(field, of_tensor(field, values) if isinstance(values, Tensor) else values)
    if array.dtype.kind == "u" and array.size and array.max() > MOST_WHOLE:
        raise InvalidData(field, array.max(), f"must be at most {MOST_WHOLE}, the largest int64")
    wide = {"b": np.bool_, "f": np.float64, "i": np.int64, "u": np.int64}[array.dtype.kind]
    kept = np.uint8 if array.dtype == np.uint8 else wide
    return torch.from_numpy(np.array(array, dtype=kept, order="C"))  # a copy, which torch may write to


def stacked(field: str, values: Sequence[Tensor]) -> Tensor:
    for each in values:
        require_real(field, each)
    shapes = {tuple(each.shape) for each in values}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise InvalidData(field, f"tensors of shapes {one} and {other}", "must be of one shape")
    return torch.stack([each.detach().cpu() for each in values])


def of_tensor(field: str, values: Tensor) -> np.ndarray:
    """The array of a tensor of numbers; floats that numpy lacks, such as bfloat16, become float32."""
    require_real(field, values)
    values = values.detach().cpu().resolve_neg()
    is_known = not values.is_floating_point() or values.dtype in (torch.float32, torch.float64)
    return (values if is_known else values.float()).numpy()


def require_real(field: str, values: Tensor) -> None:
    """Refuses a tensor that is nested, sparse, quantized or without data, or holds complex numbers."""
    if values.is_complex():
        raise InvalidData(field, *COMPLEX)
    if values.is_nested:
        raise InvalidData(field, "a nested tensor", "must be a tensor of one shape")
    if values.layout != torch.strided:
        raise InvalidData(field, f"a tensor of layout {values.layout}", f"must be dense: {field}.to_dense()")
    if values.is_quantized:
        raise InvalidData(field, "a quantized tensor", f"must hold plain numbers: {field}.dequantize()")
    if values.is_meta:
        raise InvalidData(field, "a tensor on the device meta", "must hold numbers, and has none")


def as_array(field: str, values: Any) -> np.ndarray:
    """An array of numbers."""
    if hasattr(values, "toarray"):
        raise InvalidData(field, "a sparse matrix", f"must be dense: {field}.toarray()")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidData(field, "rows of different lengths", "must be an array of numbers") from error
    except (TypeError, RuntimeError) as error:  # a tensor deep in lists, which numpy cannot read
        raise InvalidData(field, "nested lists of tensors", f"must be an array of numbers: {error}") from error
    if array.dtype == object:
        array = of_objects(field, array)
    if np.ma.isMaskedArray(values) and values.mask.any():
        array = np.where(np.ma.getmaskarray(values), np.nan, array)
    if array.dtype.kind == "c":
        raise InvalidData(field, *COMPLEX)
    if array.dtype.kind not in "bfiu":
        raise InvalidData(field, f"an array of {kind_of(array)}", "must be an array of numbers")
    return array


def of_objects(field: str, array: np.ndarray) -> np.ndarray:
    """Python's objects as numbers; `None` is a missing value. Texts are refused, also those that show a number."""
    if not all(value is None or is_number(value) for value in array.flat):
        raise InvalidData(field, f"an array of {kind_of(array)}", "must be an array of numbers")
    plain = np.array(array.tolist()).reshape(array.shape)  # whole numbers stay whole
    try:
        return plain.astype(np.float64) if plain.dtype == object else plain
    except OverflowError as error:
        raise InvalidData(field, "a whole number beyond float64", "must be an array of numbers") from error


def is_number(value: Any) -> bool:
    return isinstance(value, Real | np.bool_ | Decimal)


def kind_of(array: np.ndarray) -> str:
    """The type of the first value that is no number, in words."""
    for value in array.flat:
        if not (value is None or is_number(value)):
            return {"str": "texts", "str_": "texts"}.get(type(value).__name__, type(value).__name__)
    return str(array.dtype)


def require_finite(field: str, values: Tensor) -> None:
    """Refuses NaN and infinity, with the first row that holds one."""
    wrong = ~torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else ~torch.isfinite(values)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        what = "NaN" if values[row].isnan().any() else "infinity"
        raise InvalidData(field, what, f"stands in row {row}: fill it in, or leave the row out")


def as_class_ids(y: Any, spec: TaskSpec) -> Tensor:
    """Class ids `[n]`, from whole numbers of any type or one-hot rows; in a sequence task, tokens `[n, length]`."""
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
