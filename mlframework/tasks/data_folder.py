"""The folder of data that users bring or download, and the cache of arrays that are computed from it."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np

from mlframework.episode import Split
from mlframework.errors import UserError
from mlframework.files import atomic, cache_folder, home_folder

__all__ = ["cached", "data_folder", "in_split_folders", "missing", "subfolders", "there", "visible"]

#: Names of folders, in lower case, whose contents belong to one split.
SPLIT_FOLDERS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

#: Files and folders, in lower case, that operating systems and archives leave behind.
LEFT_BEHIND = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found")

#: Bytes that are read at a time.
CHUNK = 1 << 20

Arrays = Mapping[str, np.ndarray]


def data_folder(folder: str | Path | None) -> Path:
    """The folder that was named, else `$MLFRAMEWORK_DATA`, else `~/.local/share/mlframework`."""
    named = folder or os.environ.get("MLFRAMEWORK_DATA")
    home = home_folder() or Path("/nonexistent")  # as Debian names it: nothing is found or written there
    return Path(named).expanduser() if named else home / ".local" / "share" / "mlframework"


def missing(path: Path, kind: str, needed: str) -> str:
    """What is wrong with a path of the user's at which no `kind` is, a folder or a file, and what is needed there."""
    if path.is_dir() or path.is_file():
        return f"is a {'folder' if path.is_dir() else 'file'}: {needed}"
    return f"there is no such {kind}, looked for at {path.expanduser().absolute()}: {needed}"


def visible(path: Path) -> list[Path]:
    """The files and folders in `path` that a user put there, in an order that is the same on every file system."""
    entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
    return sorted((entry for entry in entries if entry.name.lower() not in LEFT_BEHIND), key=composed_parts)


def subfolders(path: Path) -> list[Path]:
    return [entry for entry in visible(path) if there(entry).is_dir()]


def there(entry: Path) -> Path:
    """The entry itself; a link to nothing is refused."""
    if entry.is_symlink() and not entry.exists():
        raise UserError(f"{entry}: is a link to {os.readlink(entry)}, which is not there: mend or remove it")
    return entry


def in_split_folders(
    path: Path, members: Callable[[Path], Iterable[Any]], one_split: str
) -> dict[Split, list[Any]] | None:
    """The members of each split, if the folders in `path` are called as the splits are; None if they have other names.

    `members` are those of a folder, each with a `name`; `one_split` says that none may be in two splits. One folder
    alone with the name of a split, `test` beside `cats` and `dogs`, is a member of that name.

    Raises:
        UserError: two or more folders are called as splits are, and others are not; or a member is in two splits.
    """
    folders = subfolders(path)
    named: dict[Split, list[Path]] = {split: [] for split in get_args(Split)}
    for folder in folders:
        if split := SPLIT_FOLDERS.get(folder.name.lower()):
            named[split].append(folder)
    given = [folder.name for found in named.values() for folder in found]
    others = [folder for folder in folders if folder.name.lower() not in SPLIT_FOLDERS]
    if len(given) > 1 and others:
        why = f"stands beside folders of splits ({', '.join(given)})"
        raise UserError(f"{others[0]}: {why}: move its content to one of them, or move it away")
    if not folders or others:
        return None
    splits: dict[Split, list[Any]] = {split: [] for split in get_args(Split)}
    seen: dict[str, Path] = {}
    for split, folder in ((split, folder) for split, found in named.items() for folder in found):
        for member in members(folder):
            place = folder / member.name
            other = seen.setdefault(composed(member.name), place)
            if other != place:
                raise UserError(f"{place}: is also at {other}: {one_split}")
            splits[split].append(member)
    return splits


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): some file systems store é as e with an accent, some as one."""
    return unicodedata.normalize("NFC", name)


def composed_parts(path: Path) -> tuple[str, ...]:
    return tuple(composed(part) for part in path.parts)


def cached(
    name: str,
    settings: object,
    build: Callable[[], Arrays],
    *,
    source: str,
    accept: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
    """The arrays that `build` returns, read from the cache when they were built before.

    They are stored contiguous: sums over another memory layout are rounded in another order. The file ends with the
    SHA-256 of the rest: a damaged one is built anew. Numbers alone are read from it, never objects.

    Args:
        settings: all that they depend on; another `repr` builds them anew.
        source: the file of `build`, `__file__`; a change of it builds them anew as well.
        accept: whether arrays from the cache are what `build` would return.
    """
    key = hashlib.sha256(repr(settings).encode() + Path(source).read_bytes()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.npz"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(path)
        with path.open("rb") as raw:
            if is_whole(raw):
                with np.load(raw, allow_pickle=False) as file:
                    if accept(found := dict(file)):
                        return found
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        pass  # not there, or put there by somebody else: built below
    arrays = {name: np.ascontiguousarray(array) for name, array in build().items()}
    try:
        with atomic(path) as part:
            with part.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            with part.open("rb+") as file:
                file.write(digest_of(file))
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}), so it is computed anew every time", stacklevel=2)
    return arrays


def is_whole(file: IO[bytes]) -> bool:
    """Whether a file ends with the SHA-256 of the rest of it; it is read from its start afterwards."""
    length = file.seek(0, os.SEEK_END) - hashlib.sha256().digest_size
    file.seek(0)
    right = length >= 0 and digest_of(file, length) == file.read()
    file.seek(0)
    return right


def digest_of(file: IO[bytes], length: int | None = None) -> bytes:
    """The SHA-256 of the next bytes of a file, or of all that follow; the file may be larger than memory."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK if length is None else min(CHUNK, length)):
        digest.update(chunk)
        length = None if length is None else length - len(chunk)
    return digest.digest()
