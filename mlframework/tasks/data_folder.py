"""The folder of data that users bring or download, and the cache of arrays that are computed from it."""

from __future__ import annotations

import hashlib
import http.client
import os
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mlframework.episode import Split
from mlframework.errors import UserError
from mlframework.files import atomic, cache_folder

__all__ = ["SPLIT_FOLDERS", "cached", "data_folder", "download", "subfolders"]

#: Names of folders whose contents belong to one split.
SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}

Arrays = Mapping[str, np.ndarray]

CHUNK = 1 << 16


def data_folder(folder: str | Path | None) -> Path:
    """The folder that was named, else `$MLFRAMEWORK_DATA`, else `~/.local/share/mlframework`."""
    return Path(folder or os.environ.get("MLFRAMEWORK_DATA") or "~/.local/share/mlframework").expanduser()


def subfolders(path: Path) -> list[Path]:
    """The folders in `path` that are not hidden, sorted."""
    entries = (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(entries, key=composed_parts)


def composed(name: str) -> str:
    r"""A name in Unicode's composed form (NFC): some file systems store the letter é as e with an accent, some as one.

    >>> len("e\N{COMBINING ACUTE ACCENT}"), len(composed("e\N{COMBINING ACUTE ACCENT}"))
    (2, 1)
    """
    return unicodedata.normalize("NFC", name)


def composed_parts(path: Path) -> tuple[str, ...]:
    """The sort key of paths, so that their order is the same on every file system."""
    return tuple(composed(part) for part in path.parts)


def cached(name: str, settings: object, build: Callable[[], Arrays], *, source: str) -> Arrays:
    """The arrays that `build` returns, read from the cache when they were built before.

    Built or read, they are contiguous: sums over another memory layout are rounded in another order.

    Args:
        name: of the arrays, for the file's name.
        settings: all that they depend on; another `repr` builds them anew.
        build: computes them.
        source: the file of `build`, `__file__`; a change of it builds them anew as well.
    """
    key = hashlib.sha256(repr(settings).encode() + Path(source).read_bytes()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.npz"
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return contiguous({key: file[key] for key in file.files})
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        pass  # not there, or damaged by something outside: built below
    arrays = contiguous(build())
    try:
        with atomic(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}), so it is computed anew every time", stacklevel=2)
    return arrays


def contiguous(arrays: Arrays) -> Arrays:
    """The same numbers, each array in C's order."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def download(url: str, path: Path, *, md5: str, otherwise: str) -> None:
    """Fetches a file that must have this md5; it appears under its name whole or not at all.

    Args:
        url: where it is.
        path: where it goes.
        md5: 32 hexadecimal digits.
        otherwise: advice to the user if this fails, as in `put it into this folder`.
    """
    try:
        with atomic(path) as part:
            found = _fetch(url, part)
            if found != md5:
                raise UserError(f"{url}: came with md5 {found} instead of {md5}: try again, or {otherwise}")
    except (OSError, http.client.HTTPException) as error:  # no network, a full disk, a folder that may not be written
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer as well, with an open connection
        raise UserError(f"{url}: cannot be downloaded to {path} ({error}): {otherwise}") from error


def _fetch(url: str, path: Path) -> str:
    """Downloads `url` to `path` with a progress bar; returns its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as file, Progress(*columns) as progress:
        length = response.headers.get("Content-Length")
        bar = progress.add_task(url.rsplit("/", 1)[-1], total=int(length) if length else None)
        while chunk := response.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            progress.advance(bar, len(chunk))
    return digest.hexdigest()
