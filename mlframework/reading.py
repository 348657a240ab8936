"""Files that a user or another program wrote: read whole within a bound, or refused in one line that names the file."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from mlframework.errors import InvalidValue, UserError

__all__ = [
    *("MOST_CONFIG", "MOST_DATA", "MOST_RECORD", "MOST_WEIGHTS", "check_file", "check_size", "check_yaml"),
    *("parsed_csv", "parsed_json", "parsed_yaml", "read_bytes", "read_gzip", "read_json", "read_once", "read_text"),
]

T = TypeVar("T")

#: The most bytes that are read of a config (YAML takes a second for 100 kilobytes) and of a record in JSON.
MOST_CONFIG, MOST_RECORD = 1 << 20, 64 << 20

#: Likewise of data, which takes ten times as much memory once it is read, and of weights, which take as much.
MOST_DATA, MOST_WEIGHTS = 1 << 30, 8 << 30

#: The most values in a config, and the most brackets within brackets.
MOST_VALUES, MOST_LEVELS = 100_000, 50

#: A number in base 60, as YAML reads 1:30, of so many places that it takes minutes or fits in no float.
BASE_60 = re.compile(r"\d(:[0-5]?\d){100}")

#: Gigabytes of data that are read from one file or folder instead.
LIMIT = "MLFRAMEWORK_LARGEST_FILE"

#: The most bytes that are read of a file of the system, which says that it holds nothing and may not end.
BLOCK = 1 << 20


#: What `read_once` was given last, by what was asked for, and how many of them stay in memory.
LAST_READ: dict[object, Any] = {}
MOST_READ = 2


def read_once(asked: object, files: Iterable[Path], read: Callable[[], T]) -> T:
    """What `read` returns; or what it returned in this process, if the files have not changed since.

    The jobs of a sweep that share a process thus read their data once. Nobody may change what is returned.

    Args:
        asked: all that the result depends on beside the files; where its `repr` does not say it, nothing is kept.
    """
    if " at 0x" in repr(asked):
        return read()
    stats = ((str(file.absolute()), file.stat()) for file in files)
    key = repr(asked), tuple((name, found.st_size, found.st_mtime_ns) for name, found in stats)
    found = LAST_READ.pop(key) if key in LAST_READ else read()
    LAST_READ[key] = found  # the last one now
    for oldest in list(LAST_READ)[:-MOST_READ]:
        del LAST_READ[oldest]
    return found


def check_file(path: Path, *, most: int | None = None) -> int:
    """The size of a file; a folder, a pipe, a device, or a file of more than `most` bytes is refused.

    Raises:
        UserError: one line that names the file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is a folder, and a file is expected")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is a pipe or a device, and a file is expected")
    check_size(path, found.st_size, most)
    return found.st_size


def check_size(path: Path, size: int, most: int | None = None) -> None:
    """Refuses a file, or the files of a folder, of more than `most` bytes; None: of more than MOST_DATA."""
    limit = MOST_DATA if most is None else most
    is_data = most is None or most > MOST_RECORD
    limit = users_limit(limit) if is_data else limit
    if size > limit:
        gigabytes = -(-size // 10**9)
        remedy = f": use a part of it, or set {LIMIT}={gigabytes} (gigabytes)" if is_data else ""
        raise UserError(f"{path}: holds {shown_size(size)}, and at most {shown_size(limit)} are read{remedy}")


def users_limit(default: int) -> int:
    """The most bytes of data that the user allows."""
    given = os.environ.get(LIMIT)
    if not given:
        return default
    try:
        return int(float(given) * 10**9)
    except (ValueError, OverflowError) as error:
        raise InvalidValue(LIMIT, given, "must be a number of gigabytes") from error


def shown_size(size: int) -> str:
    """Bytes in a unit that fits.

    >>> shown_size(999), shown_size(64 << 20), shown_size(4 << 30)
    ('999 bytes', '67 MB', '4.3 GB')
    """
    if size < 10**6:
        return f"{size} bytes"
    return f"{size / 1e6:.0f} MB" if size < 10**9 else f"{size / 1e9:.1f} GB"


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error})")


def read_bytes(path: Path, *, most: int | None = None) -> bytes:
    """The content of a file of at most `most` bytes; see `check_size`."""
    size = check_file(path, most=most)
    try:
        with path.open("rb") as file:
            return file.read(max(size, BLOCK))
    except OSError as error:
        raise unreadable(path, error) from error


def read_text(path: Path, *, most: int | None = None) -> str:
    """The text of a file in UTF-8; a byte order mark is left out.

    Raises:
        UserError: it cannot be read, is too large, is binary, or is no UTF-8; the wrong byte is counted from 0.
    """
    content = read_bytes(path, most=most)
    if (place := content.find(0)) >= 0:
        raise UserError(f"{path}: is binary (byte {place} is 0), and text in UTF-8 is expected")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} (0x{content[error.start]:02x})"
        raise UserError(f"{path}: is no UTF-8 at {wrong}: save it as UTF-8") from error


#: One at a time may change csv's bound on the characters of a cell, which is a number of the whole process.
CELL_BOUND = threading.Lock()


def parsed_csv(text: str, where: str, **form: Any) -> Iterator[tuple[int, list[str]]]:
    """The last line and the cells of each row of a CSV; a cell may be as long as the text.

    Args:
        where: names the file in messages.
        form: as `csv.reader` takes it.

    Raises:
        UserError: a row cannot be read, or a quote is opened and not closed, which would make one cell of all rows that
            follow.
    """
    ended: list[bool] = []

    def end() -> Iterator[str]:
        ended.append(True)
        yield from ()

    reader, line = csv.reader(itertools.chain(io.StringIO(text, newline=""), end()), **form), 0
    try:
        while (row := next_row(reader)) is not None:
            if ended:  # while a row was read, rather than behind it
                why = "a cell begins with a quote, and no quote ends it"
                raise UserError(f"{where}: line {line + 1}: cannot be read as CSV ({why})")
            line = reader.line_num
            yield line, row
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num}: cannot be read as CSV ({error})") from error


def next_row(reader: Iterator[list[str]]) -> list[str] | None:
    with CELL_BOUND:
        before = csv.field_size_limit(sys.maxsize)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)


def read_json(path: Path, kind: type[Any] = dict) -> Any:
    """The JSON of a file of at most MOST_RECORD bytes; another `kind` of value than the one expected is refused."""
    return parsed_json(path, read_text(path, most=MOST_RECORD), kind)


def parsed_json(path: Path, text: str, kind: type[Any] = dict) -> Any:
    """The value of a JSON text; the path names its file in messages."""
    return parsed(path, text, kind, json.loads)


def parsed_yaml(path: Path, text: str, kind: type[Any], parse: Callable[[str], Any] = yaml.safe_load) -> Any:
    """What a function makes of a YAML text; the path names its file in messages."""
    check_yaml(path, text)
    return parsed(path, text, kind, parse)


def parsed(path: Path, text: str, kind: type[Any], parse: Callable[[str], Any]) -> Any:
    try:
        found = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    except RecursionError as error:
        raise UserError(f"{path}: damaged (it is nested too deeply)") from error
    if not isinstance(found, kind):
        raise UserError(f"{path}: damaged (it holds no {kind.__name__})")
    return found


def check_yaml(path: Path, text: str) -> None:
    """Refuses YAML of which a few lines stand for gigabytes or take minutes: names within names, and deep brackets."""
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[{\]}]", text))
    if max(depths, default=0) > MOST_LEVELS:  # the parser's time grows with the third power of the levels
        raise UserError(f"{path}: is nested too deeply, in more than {MOST_LEVELS} brackets")
    if BASE_60.search(text):
        raise UserError(f"{path}: holds a number in base 60 (as 1:30 is one) of more than 100 places")
    if "&" not in text or "*" not in text:
        return
    try:
        size = values_in(yaml.compose(text, Loader=yaml.SafeLoader), {})
    except (yaml.YAMLError, RecursionError):
        return  # who parses it says what is wrong
    if size > MOST_VALUES:
        why = f"stands for more than {MOST_VALUES} values, once its aliases (*name) are followed"
        raise UserError(f"{path}: {why}")


def values_in(node: yaml.Node, known: dict[int, float]) -> float:
    """The values that a node of YAML stands for; infinity if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        pairs = isinstance(node, yaml.MappingNode)
        inside = [each for pair in node.value for each in pair] if pairs else node.value
        known[id(node)] = 1 + sum(values_in(each, known) for each in inside if isinstance(each, yaml.Node))
    return known[id(node)]


def read_gzip(path: Path, *, most: int) -> bytes:
    """The content of a gzipped file; one that unpacks to more than `most` bytes is refused before it has done so."""
    packed = read_bytes(path, most=most)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            found = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as gzip ({error})") from error
    check_size(path, len(found), most)
    return found
