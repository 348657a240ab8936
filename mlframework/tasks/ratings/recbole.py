"""Ratings in RecBole's atomic files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from mlframework.errors import InvalidValue, UserError
from mlframework.tasks.data_folder import missing
from mlframework.tasks.ratings.source import Ratings, RatingSource, Value, number, table_rows

__all__ = ["RecBole"]

ADVICE = "pip install --no-deps recbole==1.2.1, or name a folder with an .inter file (task.source.path)"


class RecBole(RatingSource):
    """A data set in RecBole's atomic files: `<name>.inter`, and `<name>.user` and `<name>.item` with attributes.

    Their first line names the columns with their types, `rating:float`; fields are separated by tabs, and the members
    of a `_seq` by spaces. Everything but the ratings is read as it stands; RecBole itself is not imported.

    Args:
        path: the folder of the files. None takes MovieLens-100K from the installed package `recbole`, whose licence
            terms are those of GroupLens.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()

    def read(self) -> Ratings:
        folder = self.path or installed()
        if self.path is not None and not self.path.is_dir():
            raise InvalidValue("path", self.path, missing(self.path, "folder", "must name one with an .inter file"))
        found = sorted(folder.glob("*.inter"))
        if len(found) != 1:
            raise UserError(f"{folder}: holds {len(found)} files .inter, and must hold one: {ADVICE}")
        triples = []
        for where, row in atomic_rows(found[0]):
            if not {"user_id", "item_id", "rating"} <= row.keys():
                raise UserError(f"{where}: has the columns {', '.join(row)}; user_id, item_id and rating are needed")
            triples.append((str(row["user_id"]), str(row["item_id"]), number(str(row["rating"]), where, "rating")))
        if not triples:
            raise UserError(f"{found[0]}: holds no ratings")
        users, items = (attributes(found[0].with_suffix(f".{kind}"), f"{kind}_id") for kind in ("user", "item"))
        return Ratings(triples, users, items)


def installed() -> Path:
    """The folder of MovieLens-100K in the package `recbole`, which is found without being imported."""
    spec = find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"task.source.path=null: the package recbole is not installed: {ADVICE}")
    return Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k"


def attributes(path: Path, key: str) -> dict[str, dict[str, Value]]:
    """The attributes of users or items by their number; none where the file is not there."""
    if not path.is_file():
        return {}
    return {
        str(row[key]): {name: value for name, value in row.items() if name != key and value}
        for _, row in atomic_rows(path)
        if key in row
    }


def atomic_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Value]]]:
    """The place and the fields of each line, by column; those of a `_seq` are split at spaces."""
    lines = table_rows(path, "\t")
    header = [name.partition(":")[::2] for name in next(lines, ("", []))[1]]
    for where, fields in lines:
        if len(fields) != len(header):
            raise UserError(f"{where}: has {len(fields)} fields, and the first line names {len(header)}")
        yield (
            where,
            {
                name: tuple(field.split()) if kind.endswith("_seq") else field
                for (name, kind), field in zip(header, fields, strict=True)
            },
        )
