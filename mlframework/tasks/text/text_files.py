"""Reads a user's texts; an error names the file and the place in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from mlframework.errors import InvalidValue, UserError

__all__ = ["Unit", "check_unit", "read_text", "units"]

#: A text is a line, a paragraph between empty lines, or the whole file.
Unit = Literal["line", "paragraph", "file"]


def check_unit(unit: str) -> None:
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
