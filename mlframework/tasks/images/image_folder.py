"""A user's own images: one folder per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.screen import stage
from mlframework.tasks.data_folder import Arrays, cached, in_split_folders, missing, subfolders, there, visible
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification, check_at_least, split_by_hash
from mlframework.tasks.images import pixels
from mlframework.tasks.images.own_images import as_images

__all__ = ["ImageFolder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

#: What `path` must be.
NEEDED = "must name a folder that holds one folder of images per class"


class ImageFolder(FewShotClassification):
    """Which of `n_way` folders does an image belong to? `path/<class>/*.png`, any number of images per class.

    Where `path` holds folders called `train`, `validation` (or `val`, `valid`, `dev`) and `test`, classes are theirs.
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
        if path is None:
            raise InvalidValue("path", path, NEEDED)
        if channels not in (1, 3):
            raise InvalidValue("channels", channels, "must be 1 (grey) or 3 (colours)")
        check_at_least(1, image_size=image_size)
        if bits is not None and (type(bits) is not int or not 8 <= bits <= 16):
            raise InvalidValue("bits", bits, "must be a whole number from 8 to 16, or null")
        shape = (channels, image_size, image_size)
        super().__init__(shape, n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=smallest_class)
        self.path, self.bits = Path(path).expanduser(), bits

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        return as_images(x, self.spec.x_shape, bits=self.bits)

    def load(self, split: Split) -> ClassIndexed:
        if not self.path.is_dir():
            raise InvalidValue("path", self.path, missing(self.path, "folder", NEEDED))
        splits = split_classes(self.path)
        for name, classes in splits.items():  # all of them now, rather than at the first validation
            self._check_sizes(classes, name)
        classes = splits[split]
        files = [file for images in classes.values() for file in images]
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        shape, bits = self.spec.x_shape, self.bits

        def read_images() -> Arrays:
            images = np.empty((len(files), *shape), dtype=np.uint8)
            with stage(f"reading images of {self.path}", len(files)) as at:
                for number, file in enumerate(files):
                    images[number] = pixels.read_image(file, shape, bits)
                    at.done += 1
            return {"images": images}

        arrays = cached("image_folder", (stats, shape, bits), read_images, source=pixels.__file__)
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
    images = [there(entry) for entry in visible(folder) if entry.suffix.lower() in SUFFIXES]
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)}): add some, or remove the folder")
    return images
