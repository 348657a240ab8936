"""Reads one image of any common format into 8 bits per channel, in the size and the channels of a task."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mlframework.errors import InvalidValue, UserError
from mlframework.reading import check_file

__all__ = ["UNREADABLE", "pixels_of", "read_image"]

#: The formats that are read, as Pillow calls them. It would run PostScript with Ghostscript, also within IPTC.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")

# Bits per pixel that cameras store in 16-bit files; a file that needs more than the last one uses all 16.
DEPTHS = (8, 10, 12, 14)
SHALLOW = DEPTHS[-1]

#: The most pixels of an image: 8,192 x 8,192. A small file can declare any size, and its pixels fill the memory.
MOST_PIXELS = 2**26

# PIL raises these on files that are no images.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_image(path: Path, x_shape: tuple[int, ...], bits: int | None = None) -> np.ndarray:
    """One image as uint8 `x_shape`: `[channels, height, width]`."""
    check_file(path)
    try:
        with path.open("rb") as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower than PIL's
                image = Image.open(file, formats=formats())
            check_opened(image)
            return pixels_of(path, image, x_shape, bits)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): mend or remove it") from error


@functools.cache
def formats() -> list[str]:
    """`FORMATS`, as far as this version of Pillow has them."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_opened(image: Image.Image) -> None:
    """Refuses an image that is too large, before its pixels are read."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, and at most {MOST_PIXELS} are read: scale it down")


def pixels_of(path: Path, image: Image.Image, x_shape: tuple[int, ...], bits: int | None = None) -> np.ndarray:
    """The pixels of an open image as uint8 `x_shape`; the path names it in messages."""
    channels, height, width = x_shape
    plain = opaque(eight_bits(path, image, bits)).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(plain.resize((width, height), Image.Resampling.LANCZOS))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def eight_bits(path: Path, image: Image.Image, bits: int | None) -> Image.Image:
    """The image with 8 bits per channel, turned as its EXIF says; `bits` as in `ImageFolder`."""
    deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))  # known before pixels are read
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits per pixel, mode {image.mode}")
    if not deep:
        return image
    if not image.mode.startswith("I;16"):
        check_colours(path, image, bits)
        return image
    pixels = np.asarray(image)
    check_greys(path, int(pixels.max()), bits)
    return Image.fromarray((pixels >> ((bits or 16) - 8)).astype(np.uint8))


def check_greys(path: Path, largest: int, bits: int | None) -> None:
    """Refuses greys with more bits than the user said, and greys that would lose most of their levels."""
    needed = largest.bit_length()
    if bits is not None and needed > bits:
        raise InvalidValue("bits", bits, f"must be at least {needed}: {path} holds the value {largest}")
    if bits is None and 0 < needed <= SHALLOW:
        depth = next(depth for depth in DEPTHS if depth >= needed)
        why = f"{path} uses {needed} of its 16 bits, of which the upper 8 would be read"
        raise InvalidValue("bits", bits, f"{why}: must be {depth}, or 16 for that")


def check_colours(path: Path, image: Image.Image, bits: int | None) -> None:
    """Refuses 16-bit colours that would lose most of their levels: PIL reads the upper 8 bits of each channel alone."""
    needed = 8 + int(np.asarray(image.convert("RGB")).max()).bit_length()
    if bits != 16 and 8 < needed <= SHALLOW:
        why = f"uses {needed} of the 16 bits of a colour, of which the upper 8 are read"
        raise UserError(f"{path}: {why}: store 8 bits per colour, or set task.bits=16")


def opaque(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel, on white where it is transparent."""
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
