"""Reads texts; an error names the file and the place in it."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mlframework.errors import InvalidValue, UserError

__all__ = ["Unit", "check_unit", "read_json", "read_text", "units"]

#: A text is a line, a paragraph between empty lines, or the whole file.
Unit = Literal["line", "paragraph", "file"]


def check_unit(unit: str) -> None:
    """Refuses any other unit."""
    if unit not in get_args(Unit):
        raise InvalidValue("unit", unit, f"must be one of {', '.join(get_args(Unit))}")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; a byte order mark is left out.

    Raises:
        UserError: it cannot be read, is binary, or is no UTF-8; which byte is wrong is counted from 0.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if b"\0" in content:
        raise UserError(f"{path}: is binary (byte {content.index(0)} is 0), and text in UTF-8 is expected")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} (0x{content[error.start]:02x})"
        raise UserError(f"{path}: is no UTF-8 at {wrong}: save it as UTF-8") from error


def units(text: str, unit: Unit) -> list[str]:
    """The texts of a file without white space around them; empty ones are left out."""
    text = text.replace("\r\n", "\n")
    parts = {"line": text.split("\n"), "paragraph": re.split(r"\n\s*\n", text), "file": [text]}[unit]
    return [part.strip() for part in parts if part.strip()]


def read_json(folder: Path, name: str, form: str) -> Mapping[str, Any]:
    """The gzipped JSON object in `folder/text/name` or `folder/name`; `form` says in words how it must look."""
    places = [folder / "text" / name, folder / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"{places[0]}: is not there: put it there ({form}), or name its folder by task.data_dir=...")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: cannot be read as gzipped JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold {form}")
    return found
