"""Texts by source, as JSON in the data folder."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlframework.errors import UserError

__all__ = ["read_json"]


def read_json(folder: Path, name: str, form: str) -> Mapping[str, Any]:
    """The gzipped JSON object in `folder/text/name` or `folder/name`.

    Args:
        folder: the data folder.
        name: of the file.
        form: of its content, in words.
    """
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
