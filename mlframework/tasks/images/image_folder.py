"""A user's own images: one folder per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.tasks.data_folder import Arrays, cached, in_split_folders, subfolders, visible
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification, check_at_least, split_by_hash

__all__ = ["ImageFolder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Bits per pixel that cameras store in 16-bit files; a file that needs more than the last one uses all 16.
DEPTHS = (8, 10, 12, 14)
SHALLOW = DEPTHS[-1]

# PIL raises these on files that are no images.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageFolder(FewShotClassification):
    """Which of `n_way` folders does an image belong to? `path/<class>/*.png`, any number of images per class.

    Where `path` holds nothing but folders called `train`, `validation` (or `val`) and `test`, the classes are theirs.
    Otherwise the classes are split in a fixed order: 64 % train, 16 % validation, 20 % test. Images of any size are
    scaled to a square by PIL's Lanczos filter and turned as their EXIF says; transparent pixels become white.

    Args:
        path: the folder.
        n_way, k_shot, k_query: see `FewShotClassification`.
        channels: 3 for colours, 1 for grey.
        bits: how many bits the pixels of 16-bit files use, 8 to 16: those of a 12-bit camera end at 4095. None: all 16,
            and a file whose pixels need 14 or fewer is an error.
        image_size: height and width.
        smallest_class: how many images every class has at least, if you know; with enough for `k_shot + k_query`, no
            task is ragged, and layers that mix examples are faster.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        n_way: int,
        k_shot: int | Sequence[int],
        k_query: int,
        channels: int = 3,
        image_size: int = 84,
        bits: int | None = None,
        smallest_class: int | None = None,
    ) -> None:
        if path is None or not Path(path).expanduser().is_dir():
            raise InvalidValue("path", path, "must name a folder that holds one folder of images per class")
        if channels not in (1, 3):
            raise InvalidValue("channels", channels, "must be 1 (grey) or 3 (colours)")
        check_at_least(1, image_size=image_size)
        if bits is not None and (type(bits) is not int or not 8 <= bits <= 16):
            raise InvalidValue("bits", bits, "must be a whole number from 8 to 16, or null")
        shape = (channels, image_size, image_size)
        super().__init__(shape, n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=smallest_class)
        self.path, self.bits = Path(path).expanduser(), bits

    def load(self, split: Split) -> ClassIndexed:
        splits = split_classes(self.path)
        for name, classes in splits.items():  # all of them now, rather than at the first validation
            self._check_sizes(classes, name)
        classes = splits[split]
        files = [file for images in classes.values() for file in images]
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        shape, bits = self.spec.x_shape, self.bits

        def read_images() -> Arrays:
            return {"images": np.stack([read_image(file, shape, bits) for file in files])}

        arrays = cached("image_folder", (stats, shape, bits), read_images, source=__file__)
        sizes = torch.tensor([len(images) for images in classes.values()])
        return ClassIndexed(torch.from_numpy(arrays["images"]), sizes, tuple(folder.name for folder in classes))

    def _check_sizes(self, classes: Mapping[Path, Sequence[Path]], split: Split) -> None:
        if len(classes) < self.n_way:
            raise InvalidValue("n_way", self.n_way, f"{self.path} has only {len(classes)} classes for {split}")
        for folder, files in classes.items():
            if len(files) <= self.shots[1]:
                why = f"{folder} has only {len(files)} images, and one must be left to query"
                raise InvalidValue("k_shot", self.shots[1], why)


def split_classes(path: Path) -> dict[Split, dict[Path, list[Path]]]:
    """Every split's class folders with their images."""
    folders = subfolders(path)
    if not folders:
        raise UserError(f"{path}: holds no folders: put one folder of images per class there")
    splits = in_split_folders(path, subfolders, "a class belongs to one split only")
    if splits is None:
        names = split_by_hash(folder.name for folder in folders)
        splits = {split: [path / name for name in chosen] for split, chosen in names.items()}
    elif empty := [split for split, classes in splits.items() if not classes]:
        why = f"holds no class folders: a split for each of {', '.join(splits)} is needed"
        raise UserError(f"{path / empty[0]}: {why}")
    return {split: {folder: images_in(folder) for folder in classes} for split, classes in splits.items()}


def images_in(folder: Path) -> list[Path]:
    """The image files of a class, sorted."""
    images = [entry for entry in visible(folder) if entry.suffix.lower() in SUFFIXES]
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)}): add some, or remove the folder")
    return images


def read_image(path: Path, x_shape: tuple[int, ...], bits: int | None = None) -> np.ndarray:
    """One image as uint8 `x_shape`: `[channels, height, width]`."""
    channels, height, width = x_shape
    try:
        with Image.open(path) as image:
            plain = opaque(eight_bits(path, image, bits)).convert("L" if channels == 1 else "RGB")
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): mend or remove it") from error
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
