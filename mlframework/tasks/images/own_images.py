"""A user's own images as a task's inputs: files, PIL images and arrays, in the size, channels and scale of the task."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlframework.errors import InvalidData
from mlframework.tasks.images.pixels import UNREADABLE, pixels_of, read_image
from mlframework.tasks.own_data import as_numbers

__all__ = ["as_images"]

#: Beyond these numbers floats are no images in [0, 1] with a little noise.
LEAST, MOST = -0.5, 1.5
#: Channels of an image: grey, colours, colours with transparency.
CHANNELS = (1, 3, 4)
#: Files by name, and PIL images.
NAMED = (str, Path, Image.Image)
#: Weights of red, green and blue in a grey, as PIL has them (ITU-R 601-2).
GREY = (0.299, 0.587, 0.114)


def as_images(x: Any, x_shape: tuple[int, ...], *, ink: bool = False, bits: int | None = None) -> Tensor:
    """Images `[n, channels, height, width]` in [0, 1].

    Files and PIL images are read as an image folder is. Arrays may have another size, the channels last, grey for
    colours or colours for grey. The type of an array says its scale: floats are 0 to 1, whole numbers 0 to 255, truth
    values 0 and 1. The pixels do not, so that an image alone is converted as it is among others.

    Args:
        x: paths, PIL images, or an array; a list may mix them.
        x_shape: channels, height and width of the task.
        ink: whether the task's images have ink 1 and paper 0: files and PIL images are then inverted.
        bits: of 16-bit files; see `ImageFolder`.
    """
    if isinstance(x, NAMED):
        x = [x]
    if isinstance(x, np.ndarray) and x.dtype.kind in "UO" and isinstance(x.flat[0] if x.size else None, NAMED):
        x = list(x.ravel())
    parts = [as_numbers("x", x)] if not isinstance(x, Sequence) or are_alike(x) else parts_of(x)
    arrays = [part for part in parts if isinstance(part, Tensor)]
    check_whole(arrays)
    found = torch.cat(
        [
            from_array(part, x_shape) if isinstance(part, Tensor) else from_file(part, number, x_shape, ink, bits)
            for number, part in enumerate(parts)
        ]
    )
    if ink and len(arrays) == len(parts) and found.numel() and found.median() > 0.5:
        warnings.warn("x: most of it is bright, and this task has ink 1 on paper 0: is it 1 - x?", stacklevel=2)
    return found


def are_alike(x: Sequence[Any]) -> bool:
    """Whether a list holds numbers of one shape and one type, so that it is one array."""
    if any(isinstance(each, NAMED) for each in x):
        return False
    try:
        return len({(np.shape(each), getattr(each, "dtype", None)) for each in x}) < 2
    except ValueError as error:
        raise InvalidData("x", "rows of different lengths", "must be an array of numbers") from error


def parts_of(x: Sequence[Any]) -> list[Any]:
    """Each image of a list alone: files and PIL images as they are, numbers as `[1, ...]`.

    Nested lists have no type of their own. They get a common one, as in one array: a float makes all of them floats.
    """
    parts: list[Any] = [each if isinstance(each, NAMED) else as_numbers("x", each)[None] for each in x]
    untyped = [number for number, each in enumerate(x) if not isinstance(each, NAMED) and not hasattr(each, "dtype")]
    if untyped:
        common = functools.reduce(torch.promote_types, [parts[number].dtype for number in untyped])
        for number in untyped:
            parts[number] = parts[number].to(common)
    return parts


def check_whole(arrays: Sequence[Tensor]) -> None:
    """Refuses whole numbers of 0 and 1, which more often are black and white than the two darkest greys of 255."""
    whole = [array for array in arrays if array.dtype == torch.int64 and array.numel()]
    if whole and max(int(array.max()) for array in whole) == 1 and min(int(array.min()) for array in whole) >= 0:
        why = "may be 0 to 1, or 0 to 255: x.astype(float) if 1 is white, x.astype('uint8') if 255 is"
        raise InvalidData("x", "whole numbers of 0 and 1", why)


def from_file(image: Any, number: int, x_shape: tuple[int, ...], ink: bool, bits: int | None) -> Tensor:
    """A file or a PIL image, `[1, channels, height, width]`."""
    if isinstance(image, Image.Image):
        try:
            pixels = pixels_of(Path(f"x[{number}]"), image, x_shape, bits)
        except UNREADABLE as error:
            raise InvalidData(f"x[{number}]", f"a PIL image of mode {image.mode}", str(error)) from error
    else:
        pixels = read_image(Path(image).expanduser(), x_shape, bits)
    scaled = torch.from_numpy(np.array(pixels)).float()[None] / 255  # a copy: PIL's memory is read-only
    return 1 - scaled if ink else scaled


def from_array(array: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Images from an array of any layout that has one meaning."""
    images = in_unit_range(with_channels(array, x_shape))
    return in_size(in_channels(images, x_shape[0]), x_shape)


def in_unit_range(array: Tensor) -> Tensor:
    """Numbers in [0, 1]: whole numbers are divided by 255, floats and truth values are not."""
    low, high = (float(array.min()), float(array.max())) if array.numel() else (0.0, 0.0)
    if array.dtype == torch.bool:
        return array.float()
    if not array.is_floating_point() and low >= 0 and high <= 255:
        return array.float() / 255
    if array.is_floating_point() and not (low < LEAST or high > MOST):  # NaN is refused elsewhere
        return array.float()
    span = f"from {low:.4g} to {high:.4g}"
    if low >= 0 and high <= 255:
        raise InvalidData("x", f"floats {span}", "must be in [0, 1]: x / 255 if 255 is white")
    why = "must be in [0, 1], or whole numbers from 0 to 255, as the task's images are"
    raise InvalidData("x", f"numbers {span}", why)


def with_channels(images: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Images `[n, channels, height, width]` of any size; the channels may stand last or be left out."""
    shape, task = tuple(images.shape), tuple(x_shape)
    if images.dim() == 2 and shape[1] == math.prod(task):
        return images.view(-1, *task)
    if images.dim() == 2 and shape == task[1:]:
        return images[None, None]
    if images.dim() == 3 and 0 not in shape[1:]:
        return of_three_axes(images, task)
    if images.dim() == 4 and 0 not in shape[1:]:
        return of_four_axes(images, task)
    raise wrong_shape(images, task)


def of_three_axes(images: Tensor, task: tuple[int, ...]) -> Tensor:
    """One image with channels, or grey images: of a grey task the first axis counts images."""
    first, *_, last = images.shape
    if tuple(images.shape) == task:
        return images[None]
    if last in CHANNELS and task[2] != last:
        return images.movedim(2, 0)[None]
    if task[0] == 3 and first in (3, 4):
        why = f"may be one image in colour, x[None], or {first} grey ones, x[:, None]"
        raise InvalidData("x", f"an array of shape {tuple(images.shape)}", why)
    return images[:, None]


def of_four_axes(images: Tensor, task: tuple[int, ...]) -> Tensor:
    """Images whose channels stand first or last."""
    shape = tuple(images.shape)
    may_be_first, may_be_last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if shape[1:] == task or (may_be_first and not may_be_last):
        return images
    if shape[1:] == (*task[1:], task[0]) or (may_be_last and not may_be_first):
        return images.movedim(3, 1)
    if may_be_first:
        raise InvalidData(
            "x", f"an array of shape {shape}", "may have its channels first or last: scale it to the task's"
        )
    raise wrong_shape(images, task)


def wrong_shape(images: Tensor, task: tuple[int, ...]) -> InvalidData:
    return InvalidData("x", f"an array of shape {tuple(images.shape)}", f"must be images of shape {('n', *task)}")


def in_channels(images: Tensor, channels: int) -> Tensor:
    """Grey for colours, or colours for grey; transparent pixels become white."""
    if images.shape[1] == 4:
        colour, alpha = images[:, :3], images[:, 3:]
        images = colour * alpha + (1 - alpha)
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return torch.einsum("nchw,c->nhw", images, torch.tensor(GREY))[:, None]
    return images.expand(-1, channels, -1, -1)


def in_size(images: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Images in the task's size, by PIL's Lanczos filter."""
    _, height, width = x_shape
    if tuple(images.shape[2:]) == (height, width):
        return images
    if not len(images):
        return images.new_zeros(0, *x_shape)
    planes = images.flatten(0, 1).numpy()
    sized = [Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS) for plane in planes]
    return torch.from_numpy(np.stack([np.asarray(each) for each in sized])).clamp(0, 1).view(-1, *x_shape)
