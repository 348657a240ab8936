"""The texts of a user's file: its lines, its paragraphs, or the whole of it."""

from __future__ import annotations

import re
from typing import Literal, get_args

from mlframework.errors import InvalidValue

__all__ = ["Unit", "check_unit", "units"]

#: A text is a line, a paragraph between empty lines, or the whole file.
Unit = Literal["line", "paragraph", "file"]


def check_unit(unit: str) -> None:
    if unit not in get_args(Unit):
        raise InvalidValue("unit", unit, f"must be one of {', '.join(get_args(Unit))}")


def units(text: str, unit: Unit) -> list[str]:
    """The texts of a file without white space around them; empty ones are left out."""
    text = text.replace("\r\n", "\n")
    parts = {"line": text.split("\n"), "paragraph": re.split(r"\n\s*\n", text), "file": [text]}[unit]
    return [part.strip() for part in parts if part.strip()]
