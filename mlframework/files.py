"""Files written whole, or not at all, objects that a file can describe, and the leaves of its content."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    *("KeepsArguments", "as_json", "atomic", "cache_folder", "home_folder", "installed_places", "leaves", "naming"),
    *("remove_parts", "write_json", "write_part", "write_text"),
]


class KeepsArguments:
    """A class whose objects remember the arguments of their constructor, so that a file can describe them."""

    #: The positional ones and the keywords.
    constructor_arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        made.__dict__["constructor_arguments"] = (args, kwargs)  # a module would look for parameters in them
        return made


# A class without a constructor of its own takes no settings.
vars(KeepsArguments.__new__)["__signature__"] = inspect.Signature(
    [inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)]
)


def cache_folder() -> Path:
    """`$MLFRAMEWORK_CACHE`, else `~/.cache/mlframework`; all in it can be computed again.

    A user without a home, as in a container, has a folder that is removed when the process ends.
    """
    if named := os.environ.get("MLFRAMEWORK_CACHE"):
        return Path(named).expanduser()
    home = home_folder()
    return Path(passing_folder().name) if home is None else home / ".cache" / "mlframework"


def home_folder() -> Path | None:
    """The user's home; None if there is no such folder, or nobody knows it."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and home.is_dir() else None


@functools.cache
def passing_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process."""
    return tempfile.TemporaryDirectory(prefix="mlframework-cache-")


def installed_places() -> tuple[str, ...]:
    """How the paths of installed packages and of Python's own modules begin.

    Packages may lie in several places, as those of a user and of the system, and a place behind a link.
    """
    named = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    named += [place for place in sys.path if os.path.basename(place) in ("site-packages", "dist-packages")]
    return tuple(f"{place}{os.sep}" for place in {*named, *map(os.path.realpath, named)})


@contextmanager
def atomic(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A file to write in `path`'s place: it takes the name when all went well, and is gone otherwise.

    Args:
        durable: whether it is on the disk before it takes the name, so that a power cut leaves the old file or this.

    Raises:
        OSError: with the name of the file, as for a full disk, of which Python names none.
    """
    part = part_of(path)
    try:
        with naming(path, part):
            yield part
            if durable:
                sync(part)
            os.replace(part, path)
    finally:
        with suppress(OSError):  # on a disk that is read-only by now
            part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Names a file in an error of the system that names none, as that of a full disk, or one of some `others`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, *map(str, others)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Returns once the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def part_of(path: Path) -> Path:
    """A new name for a file that is being written: `name.<32 hexadecimal digits>.part`, in a folder that is there.

    Every writer has its own: two processes may build the same file at once, and either is right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


def remove_parts(folder: Path, names: Collection[str]) -> None:
    """Removes half-written versions of the files `names`, which killed processes left, from a folder."""
    for path in folder.glob("*.part"):
        found = re.fullmatch(r"(.+)\.[0-9a-f]{32}\.part", path.name)
        if found and found[1] in names:
            path.unlink(missing_ok=True)


def as_json(content: Any, *, indent: int | None = None) -> str:
    """JSON text that every reader accepts: a number that is not finite becomes `null`.

    >>> as_json({"loss": float("nan"), "steps": (1, 2)})
    '{"loss": null, "steps": [1, 2]}'
    """
    return json.dumps(without_nan(content), indent=indent, allow_nan=False)


def without_nan(content: Any) -> Any:
    """The same mappings, lists and values, with None in place of NaN and infinity."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries; a list is a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Writes JSON atomically; see `as_json`."""
    write_text(path, as_json(content, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_part(page: Path, name: str, text: str) -> None:
    """Replaces the part of a page between `<!-- begin: name -->` and the `<!-- end -->` after it."""
    begin, end = f"<!-- begin: {name} -->", "<!-- end -->"
    head, rest = page.read_text(encoding="utf-8").split(begin, 1)
    write_text(page, f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")
