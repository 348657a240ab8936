"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic"]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file to write in `path`'s place: it takes the name when all went well, and is gone otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writer: two processes may build the same file at once, and either is right.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
