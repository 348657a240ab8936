"""A user's own images as a task's inputs: files, PIL images and arrays, in the size, channels and scale of the task."""

from __future__ import annotations

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
#: Files by name, and PIL images.
NAMED = (str, Path, Image.Image)
#: Weights of red, green and blue in a grey, as PIL has them (ITU-R 601-2).
GREY = (0.299, 0.587, 0.114)


def as_images(x: Any, x_shape: tuple[int, ...], *, ink: bool = False, bits: int | None = None) -> Tensor:
    """Images `[n, channels, height, width]` in [0, 1].

    Files and PIL images are read as an image folder is. Arrays hold the task's own values: [0, 1], or 0 to 255 as whole
    numbers. They may have another size, the channels last, grey for colours or colours for grey.

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
    if isinstance(x, Sequence) and any(isinstance(each, NAMED) for each in x):
        return torch.cat([one_image(each, number, x_shape, ink, bits) for number, each in enumerate(x)])
    found = from_array(as_numbers("x", of_one_shape(x, x_shape)), x_shape)
    if ink and found.numel() and found.median() > 0.5:
        warnings.warn("x: most of it is bright, and this task has ink 1 on paper 0: is it 1 - x?", stacklevel=2)
    return found


def one_image(image: Any, number: int, x_shape: tuple[int, ...], ink: bool, bits: int | None) -> Tensor:
    """One image of a list, `[1, channels, height, width]`."""
    if not isinstance(image, NAMED):
        return from_array(as_numbers("x", image)[None], x_shape)
    if isinstance(image, Image.Image):
        try:
            pixels = pixels_of(Path(f"x[{number}]"), image, x_shape, bits)
        except UNREADABLE as error:
            raise InvalidData(f"x[{number}]", f"a PIL image of mode {image.mode}", str(error)) from error
    else:
        pixels = read_image(Path(image).expanduser(), x_shape, bits)
    scaled = torch.from_numpy(np.array(pixels)).float()[None] / 255  # a copy: PIL's memory is read-only
    return 1 - scaled if ink else scaled


def of_one_shape(x: Any, x_shape: tuple[int, ...]) -> Any:
    """The images of a list, brought to the task's shape one by one where their own shapes differ."""
    if not isinstance(x, Sequence) or len({np.shape(each) for each in x}) < 2:
        return x
    return torch.cat([from_array(as_numbers("x", each)[None], x_shape) for each in x])


def from_array(array: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Images from an array of any layout that has one meaning."""
    scaled = in_unit_range(array)
    return in_size(in_channels(with_channels(scaled, x_shape), x_shape[0]), x_shape)


def in_unit_range(array: Tensor) -> Tensor:
    """Numbers in [0, 1]: bytes and whole numbers up to 255 are divided by 255."""
    low, high = (float(array.min()), float(array.max())) if array.numel() else (0.0, 0.0)
    if array.dtype == torch.bool:
        return array.float()
    is_whole = not array.is_floating_point() or (high > MOST and bool((array == array.round()).all()))
    if is_whole and low >= 0 and high <= 255:
        if array.dtype == torch.int64 and high == 1:
            why = "are 0 to 255 as whole numbers and 0 to 1 as floats: x.astype(float) or 255 * x"
            raise InvalidData("x", "whole numbers of 0 and 1", why)
        return array.float() / 255
    if low < LEAST or high > MOST:
        what = f"numbers from {low:.4g} to {high:.4g}"
        raise InvalidData("x", what, "must be in [0, 1], or whole numbers from 0 to 255, as the task's images are")
    return array.float()


def with_channels(images: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Images `[n, channels, height, width]` of any size; the channels may stand last or be left out."""
    shape, task = tuple(images.shape), tuple(x_shape)
    if images.dim() == 2 and shape[1] == math.prod(task):
        return images.view(-1, *task)
    if images.dim() == 2 and shape == task[1:]:
        return images[None, None]
    if images.dim() == 3:
        return of_three_axes(images, task)
    if images.dim() == 4 and shape[1] in (1, 3, 4) and (shape[1:] == task or shape[3] not in (1, 3, 4)):
        return images
    if images.dim() == 4 and shape[3] in (1, 3, 4):
        return images.movedim(3, 1)
    raise InvalidData("x", f"an array of shape {shape}", f"must be images of shape {('n', *task)}")


def of_three_axes(images: Tensor, task: tuple[int, ...]) -> Tensor:
    """One image with channels, or grey images: of a grey task the first axis counts images."""
    first, *_, last = images.shape
    if tuple(images.shape) == task or (task[0] == 3 and first in (3, 4)):
        return images[None]
    if last in (3, 4) and task[2] != last:
        return images.movedim(2, 0)[None]
    return images[:, None]


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
    planes = images.flatten(0, 1).numpy()
    sized = [Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS) for plane in planes]
    return torch.from_numpy(np.stack([np.asarray(each) for each in sized])).clamp(0, 1).view(-1, *x_shape)
