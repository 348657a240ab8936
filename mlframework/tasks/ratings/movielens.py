"""MovieLens' own files, of the data sets 100K and 1M."""

from __future__ import annotations

import re
from pathlib import Path

from mlframework.errors import InvalidValue, UserError
from mlframework.tasks.data_folder import missing
from mlframework.tasks.ratings.source import Ratings, RatingSource, Value, number, table_rows, with_values

__all__ = ["MovieLens"]

YEAR = re.compile(r"\((\d{4})\)\s*$")


NEEDED = "must name a folder with u.data (MovieLens-100K) or ratings.dat (1M)"


class MovieLens(RatingSource):
    """MovieLens in its original files: 100K (`u.data`, `u.item`, `u.user`, `u.genre`) or 1M (`ratings.dat`, ...).

    Users have an age, a gender and an occupation, films a year and genres.

    Args:
        path: the folder of the unpacked files. They are not part of the package: see
            <https://grouplens.org/datasets/movielens/> for them and their terms.

    Reference: Harper, Konstan, The MovieLens Datasets, 2015, doi:10.1145/2827872.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        if path is None:
            raise InvalidValue("path", path, NEEDED)
        self.path = Path(path).expanduser()

    def read(self) -> Ratings:
        if (self.path / "u.data").is_file():
            return self.read_100k()
        if (self.path / "ratings.dat").is_file():
            return self.read_1m()
        if not self.path.is_dir():
            raise InvalidValue("path", self.path, missing(self.path, "folder", NEEDED))
        raise UserError(f"{self.path}: holds neither u.data (MovieLens-100K) nor ratings.dat (1M): unpack one there")

    def read_100k(self) -> Ratings:
        genres = [row[0] for _, row in table_rows(self.path / "u.genre", "|", encoding="latin-1")]
        users: dict[str, dict[str, Value]] = {}
        for where, row in table_rows(self.path / "u.user", "|", encoding="latin-1"):
            user, *given = fields(where, row, 5)
            users[user] = with_values(("age", "gender", "occupation"), given[:3])
        items: dict[str, dict[str, Value]] = {}
        for where, row in table_rows(self.path / "u.item", "|", encoding="latin-1"):
            item, title, *rest = fields(where, row, 5 + len(genres))
            flags = zip(genres, rest[3:], strict=True)
            items[item] = film(title, tuple(genre for genre, flag in flags if flag == "1"))
        return Ratings(triples(self.path / "u.data", "\t"), users, items)

    def read_1m(self) -> Ratings:
        users: dict[str, dict[str, Value]] = {}
        for where, row in table_rows(self.path / "users.dat", "::", encoding="latin-1"):
            user, gender, age, occupation, _ = fields(where, row, 5)
            # The occupation is a code: as a number it would be an amount.
            users[user] = with_values(("age", "gender", "occupation"), (age, gender, f"occupation {occupation}"))
        items: dict[str, dict[str, Value]] = {}
        for where, row in table_rows(self.path / "movies.dat", "::", encoding="latin-1"):
            item, title, genres = fields(where, row, 3)
            items[item] = film(title, tuple(genres.split("|")))
        return Ratings(triples(self.path / "ratings.dat", "::"), users, items)


def triples(path: Path, separator: str) -> list[tuple[str, str, float]]:
    found = []
    for where, row in table_rows(path, separator, encoding="latin-1"):
        user, item, rating, _ = fields(where, row, 4)
        found.append((user, item, number(rating, where, "rating")))
    if not found:
        raise UserError(f"{path}: holds no ratings")
    return found


def film(title: str, genres: tuple[str, ...]) -> dict[str, Value]:
    year = YEAR.search(title)
    return with_values(("year", "genres"), (year[1] if year else "", genres))


def fields(where: str, row: list[str], count: int) -> list[str]:
    if len(row) != count:
        raise UserError(f"{where}: has {len(row)} fields, and {count} are expected")
    return row
