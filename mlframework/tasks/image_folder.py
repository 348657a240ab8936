"""A user's own images: one folder per class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.tasks.data_folder import SPLIT_FOLDERS, Arrays, cached, subfolders
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification, check_at_least, split_by_hash

__all__ = ["ImageFolder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# What PIL raises on files that are not what their name says.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageFolder(FewShotClassification):
    """Which of `n_way` folders does an image belong to? `path/<class>/*.png`, any number of images per class.

    Where `path` holds nothing but folders called `train`, `validation` (or `val`) and `test`, the classes are theirs.
    Otherwise the classes are split in a fixed order: 64 % train, 16 % validation, 20 % test. Images of any size are
    scaled to a square by PIL's Lanczos filter, turned as their EXIF says; what is transparent becomes white.

    Args:
        path: the folder.
        n_way, k_shot, k_query: see `FewShotClassification`.
        channels: 3 for colours, 1 for grey.
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
        smallest_class: int | None = None,
    ) -> None:
        if path is None or not Path(path).expanduser().is_dir():
            raise InvalidValue("path", path, "must name a folder that holds one folder of images per class")
        if channels not in (1, 3):
            raise InvalidValue("channels", channels, "must be 1 (grey) or 3 (colours)")
        check_at_least("image_size", image_size, 1)
        shape = (channels, image_size, image_size)
        super().__init__(shape, n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=smallest_class)
        self.path = Path(path).expanduser()

    def load(self, split: Split) -> ClassIndexed:
        splits = split_classes(self.path)
        for name, classes in splits.items():  # all of them now, rather than at the first validation
            self._check_sizes(classes, name)
        classes = splits[split]
        files = [file for images in classes.values() for file in images]
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        shape = self.spec.x_shape
        arrays = cached("image_folder", (stats, shape), lambda: read_images(files, shape), source=__file__)
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
    if all(folder.name in SPLIT_FOLDERS for folder in folders):
        splits = given_splits(path, folders)
    else:
        names = split_by_hash(folder.name for folder in folders)
        splits = {split: [path / name for name in chosen] for split, chosen in names.items()}
    return {split: {folder: images_in(folder) for folder in classes} for split, classes in splits.items()}


def given_splits(path: Path, folders: list[Path]) -> dict[Split, list[Path]]:
    """The class folders in folders that are called as the splits are."""
    splits: dict[Split, list[Path]] = {"train": [], "validation": [], "test": []}
    for folder in folders:
        splits[SPLIT_FOLDERS[folder.name]] += subfolders(folder)
    seen: dict[str, Path] = {}
    for split, classes in splits.items():
        if not classes:
            raise UserError(
                f"{path / split}: holds no class folders: a split for each of {', '.join(splits)} is needed"
            )
        for folder in classes:
            if folder.name in seen:
                raise UserError(f"{folder}: is also at {seen[folder.name]}: a class belongs to one split only")
            seen[folder.name] = folder
    return splits


def images_in(folder: Path) -> list[Path]:
    """The image files of a class, sorted."""
    images = sorted(
        entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")
    )
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)}): add some, or remove the folder")
    return images


def read_images(files: Iterable[Path], x_shape: tuple[int, ...]) -> Arrays:
    """uint8 `images` `[files, *x_shape]`."""
    return {"images": np.stack([read_image(file, x_shape) for file in files])}


def read_image(path: Path, x_shape: tuple[int, ...]) -> np.ndarray:
    """One image as uint8 `x_shape`: `[channels, height, width]`."""
    channels, height, width = x_shape
    try:
        with Image.open(path) as image:
            plain = opaque(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): mend or remove it") from error
    pixels = np.asarray(plain.resize((width, height), Image.Resampling.LANCZOS))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def opaque(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits per pixel, mode {image.mode}")
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
