"""The last checkpoints of a run: `last.pt`, and before it `last.1.pt`, `last.2.pt`, ...; a damaged one is passed over.

Each file is written whole and has a checksum. At every moment, that of a `kill -9` included, a whole one is there.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlframework.base_layers.checksums import DAMAGED, PACKED, in_words, is_packed, load_tensors, to_zip, zip_matches
from mlframework.errors import UserError
from mlframework.files import atomic, part_of
from mlframework.reading import MOST_WEIGHTS, check_file

__all__ = ["Newest", "kept", "newest", "require_folder", "set_damaged_aside", "write_checkpoint"]

log = logging.getLogger(__name__)


class Newest(NamedTuple):
    """The newest checkpoint that can be read, and the errors of those after it, by file."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, UserError]

    def tell(self) -> None:
        """Says which files are damaged, and where the run goes on instead."""
        for error in self.damaged.values():
            log.warning("%s: step %d of %s takes its place", error, self.state["progress"]["step"], self.path)


def older(last: Path, age: int) -> Path:
    """The file of the checkpoint before `last`, of the one before that, ..."""
    return last.with_name(f"{last.stem}.{age}{last.suffix}")


def kept(last: Path) -> list[Path]:
    """The checkpoints that are there, the newest first."""
    found = sorted((age, path) for path in last.parent.glob(f"{last.stem}.*{last.suffix}") if (age := age_of(path)))
    return [path for path in (last, *(path for _, path in found)) if path.exists()]


def age_of(path: Path) -> int:
    """How many checkpoints are newer: 1 for `last.1.pt`; 0 for other names."""
    number = path.stem.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def write_checkpoint(last: Path, state: Mapping[str, Any], *, keep: int) -> None:
    """Writes a checkpoint in the place of `last`; so many are kept, the new one included."""
    require_folder(last.parent)
    with atomic(last, durable=True) as part:
        with part.open("wb") as file:
            file.writelines(to_zip(state))
        make_room(last, keep)


def require_folder(folder: Path) -> None:
    """Refuses to make a folder again that a run once made: somebody has removed or moved it.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder is gone: it was removed or moved during the run", str(folder))


def make_room(last: Path, keep: int) -> None:
    """Gives each checkpoint the name of the next older one; `last` keeps its own name too, until it is replaced."""
    for path in reversed([path for path in kept(last) if path != last]):
        if age_of(path) + 1 < keep:
            os.replace(path, older(last, age_of(path) + 1))
        else:
            path.unlink()
    if last.exists() and keep > 1:
        copy_name(last, older(last, 1))


def copy_name(path: Path, to: Path) -> None:
    """A second name for a file; where the file system has no links, the file changes its name."""
    part = part_of(path)
    try:
        os.link(path, part)
        os.replace(part, to)
    except OSError:
        os.replace(path, to)
    finally:
        part.unlink(missing_ok=True)


def newest(last: Path) -> Newest:
    """The newest checkpoint that is whole.

    Raises:
        UserError: none is.
    """
    damaged: dict[Path, UserError] = {}
    if not last.exists() and kept(last):
        damaged[last] = UserError(f"{last}: is not there")
    for path in kept(last):
        try:
            return Newest(path, read(path), damaged)
        except UserError as error:
            damaged[path] = error
    if not damaged:
        raise UserError(f"{last}: there is no such checkpoint")
    first, *others = damaged
    others_too = f"; nor can {' or '.join(path.name for path in others)} be read" if others else ""
    advice = "use another copy of the run folder, or start a new run"
    raise UserError(f"{damaged[first]}{others_too}: {advice}")


def read(path: Path) -> dict[str, Any]:
    """The state in a file; nothing in the file is run."""
    check_file(path, most=MOST_WEIGHTS)
    try:
        if is_packed(path):
            raise ValueError(PACKED)
        if not zip_matches(path):
            raise ValueError(DAMAGED)
        state = load_tensors(path)
        whole = {"meta_layer", "optimizer", "scheduler", "generators", "progress"} <= {*state}
    except Exception as error:  # zipfile and torch.load raise whatever a broken file provokes
        raise UserError(f"{path}: cannot be read as a checkpoint ({in_words(error)})") from error
    if not whole:
        raise UserError(f"{path}: cannot be read as a checkpoint (it holds something else)")
    return dict(state)


def set_damaged_aside(last: Path) -> None:
    """Renames damaged checkpoints to `last.pt.damaged`, ..., and lets the newest whole one take their place.

    Only the process that holds the run folder calls this.
    """
    found = newest(last)
    found.tell()
    for path in found.damaged:
        if path.exists():
            os.replace(path, path.with_name(f"{path.name}.damaged"))
    if found.path != last:
        os.replace(found.path, last)
