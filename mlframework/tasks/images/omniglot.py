"""Omniglot: handwritten characters of fifty alphabets, twenty drawings each."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.reading import read_bytes
from mlframework.screen import stage
from mlframework.tasks.data_folder import Arrays, cached, data_folder
from mlframework.tasks.download import download
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification, check_at_least, hash_sorted
from mlframework.tasks.images.own_images import as_images

__all__ = ["Omniglot"]

URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
# The characters and alphabets of each zip.
ZIPS = {"images_background.zip": (964, 30), "images_evaluation.zip": (659, 20)}
# The SHA-256 of each zip as it is downloaded, and its bytes; TensorFlow Datasets has found the same.
DOWNLOADS = {
    "images_background.zip": ("ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640", 9_464_212),
    "images_evaluation.zip": ("1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee", 6_462_886),
}
DRAWINGS = 20
# The most bytes that a drawing may unpack to, of which true ones take some 300, and the most pixels of its sides.
MOST_BYTES, MOST_PIXELS = 100_000, 1000

# zipfile, zlib and PIL raise these on damaged files.
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, SyntaxError, ValueError, NotImplementedError)

VALIDATION_ALPHABETS = ("Burmese_(Myanmar)", "Early_Aramaic", "Grantha", "Japanese_(katakana)", "Tifinagh")


class Omniglot(FewShotClassification):
    """Which of `n_way` handwritten characters is it? 1,623 characters of 50 alphabets, each drawn by 20 people.

    The two canonical zips are looked for in `data_dir` and in its folder `omniglot`, and downloaded to there otherwise.
    Images are scaled by PIL's Lanczos filter, as in Finn et al.'s code, with ink 1 and paper 0.

    Args:
        n_way, k_shot, k_query: see `FewShotClassification`.
        splits: `vinyals` splits by character, in a fixed order: 1,100 train, 100 validation, 423 test. `alphabet` holds
            out whole alphabets: 25 of the 30 background alphabets train, `VALIDATION_ALPHABETS` validation, and the 20
            evaluation alphabets test.
        train_classes: characters to train on, the first so many; None: all.
        rotations: whether each character turned by 90, 180 and 270 degrees counts as three more classes, in each split.
        image_size: height and width.
        data_dir: see `data_folder`.
        download: whether zips that are not there are fetched.

    Reference: Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction,
        Science 2015. Splits by character and rotations: Vinyals et al. 2016, arXiv:1606.04080; section 4.1.1.
    Deviation: Vinyals et al. do not say which characters they held out; ours are in the order of the SHA-256 of their
        names.
    """

    divided_by = ("splits",)

    def __init__(
        self,
        *,
        n_way: int,
        k_shot: int | Sequence[int],
        k_query: int,
        splits: str = "vinyals",
        train_classes: int | None = None,
        rotations: bool = True,
        image_size: int = 28,
        data_dir: str | Path | None = None,
        download: bool = True,
    ) -> None:
        if splits not in ("vinyals", "alphabet"):
            raise InvalidValue("splits", splits, "must be vinyals or alphabet")
        check_at_least(1, image_size=image_size)
        check_at_least(1, train_classes=1 if train_classes is None else train_classes)
        shape = (1, image_size, image_size)
        super().__init__(shape, n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=DRAWINGS)
        self.splits, self.rotations, self.image_size = splits, rotations, image_size
        self.train_classes = train_classes
        self.folder, self.download = data_folder(data_dir), download

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        return as_images(x, self.spec.x_shape, ink=True)

    def load(self, split: Split) -> ClassIndexed:
        zips = find_zips(self.folder, self.download)
        settings = [content_hash(path) for path in zips], self.image_size
        arrays = cached("omniglot", settings, lambda: read_zips(zips, self.image_size), source=__file__)
        row_of = {str(name): row for row, name in enumerate(arrays["names"])}
        wanted = (by_character if self.splits == "vinyals" else by_alphabet)(list(row_of))[split]
        wanted = wanted[: self.train_classes] if split == "train" else wanted
        names = [name.split("/", 1)[1] for name in wanted]
        images = torch.from_numpy(arrays["images"][[row_of[name] for name in wanted]]).unsqueeze(2)
        if self.rotations:  # four classes of each: as they are and turned anticlockwise
            images = torch.cat([torch.rot90(images, turns, dims=(-2, -1)) for turns in range(4)])
            names = [f"{name}/rot{90 * turns:03}" for turns in range(4) for name in names]
        return ClassIndexed.from_classes(names, images)

    def source_of(self, name: str) -> str:
        return name.partition("/rot")[0]


def by_character(names: list[str]) -> dict[Split, list[str]]:
    """Characters `set/alphabet/character` of each split, in an order that is the same on any machine."""
    order = hash_sorted(names)
    return {"train": order[:1100], "validation": order[1100:1200], "test": order[1200:]}


def by_alphabet(names: list[str]) -> dict[Split, list[str]]:
    """Characters `set/alphabet/character` of each split, no alphabet in two of them."""
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for name in names:
        collection, alphabet, _ = name.split("/")
        background: Split = "validation" if alphabet in VALIDATION_ALPHABETS else "train"
        splits["test" if collection == "images_evaluation" else background].append(name)
    return splits


def find_zips(folder: Path, may_download: bool) -> list[Path]:
    """The two zips in `folder/omniglot` or `folder`, downloaded to the former if they are in neither."""
    otherwise = f"put {URL}{' and '.join(ZIPS)} into {folder / 'omniglot'}"
    paths = []
    for name in ZIPS:
        places = [folder / "omniglot" / name, folder / name]
        path = next((place for place in places if place.is_file()), places[0])
        if not path.is_file() and not may_download:
            raise InvalidValue("download", False, f"{path} is not there: allow it, or {otherwise}")
        if not path.is_file():
            sha256, size = DOWNLOADS[name]
            download(URL + name, path, sha256=sha256, size=size, otherwise=otherwise)
        paths.append(path)
    return paths


def content_hash(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def read_zips(paths: list[Path], image_size: int) -> Arrays:
    """`names` `[characters]`, as `set/alphabet/character`, and uint8 `images` `[characters, 20, height, width]`."""
    names, images = [], []
    for path in paths:
        try:
            with stage(f"reading {path}"), zipfile.ZipFile(path) as archive:
                for name, members in characters(archive, path).items():
                    names.append(name)
                    images.append([read_image(unpacked(archive, member), image_size) for member in members])
        except DAMAGED as error:
            raise UserError(f"{path}: damaged ({error}): replace it by {URL}{path.name}, or delete it") from error
    return {"names": np.array(names), "images": np.array(images, dtype=np.uint8)}


def characters(archive: zipfile.ZipFile, path: Path) -> dict[str, list[str]]:
    """The drawings' members of each character, sorted; all characters that the set has, or an error."""
    found: dict[str, list[str]] = defaultdict(list)
    for member in sorted(archive.namelist()):
        parts = member.split("/")
        if len(parts) == 4 and parts[0] == path.stem and member.endswith(".png"):
            found["/".join(parts[:3])].append(member)
    alphabets = {name.split("/")[1] for name in found}
    count = "{} characters of {} alphabets".format
    there, right = count(len(found), len(alphabets)), count(*ZIPS[path.name])
    wrong = [f"{there} instead of {right}"] if there != right else []
    sizes = ((name, len(members)) for name, members in found.items())
    wrong += [f"{size} drawings of {name} instead of {DRAWINGS}" for name, size in sizes if size != DRAWINGS]
    if wrong:
        raise UserError(f"{path}: holds {wrong[0]}: replace it by {URL}{path.name}")
    return found


def unpacked(archive: zipfile.ZipFile, member: str) -> bytes:
    """The bytes of a drawing, in memory; nothing is written. zipfile stops at the size that the archive declares."""
    if (size := archive.getinfo(member).file_size) > MOST_BYTES:
        raise ValueError(f"{member} unpacks to {size} bytes, and a drawing takes at most {MOST_BYTES}")
    return archive.read(member)


def read_image(png: bytes, image_size: int) -> np.ndarray:
    """One drawing as uint8 `[image_size, image_size]`, ink 255 and paper 0."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if max(image.size) > MOST_PIXELS:
            raise ValueError(f"a drawing of {image.size[0]} x {image.size[1]} pixels")
        drawing = image.convert("L")
    return 255 - np.asarray(drawing.resize((image_size, image_size), Image.Resampling.LANCZOS))
