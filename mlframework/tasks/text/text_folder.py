"""A user's own texts: a folder with a file or a folder per task, or one table with a column that says which task."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.reading import check_file, check_size, parsed_csv, read_once, read_text
from mlframework.screen import stage
from mlframework.tasks.data_folder import composed, composed_parts, in_split_folders, missing, visible
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.text.text_files import Unit, check_unit, units
from mlframework.tasks.text.text_tasks import Rows, Source, TextTasks, Windows
from mlframework.tasks.text.tokens import Bytes, Tokens

__all__ = ["TextFolder"]

log = logging.getLogger(__name__)

#: What `path` must be.
NEEDED = "must name a folder of texts, or a .csv or .jsonl"

#: The most names of tasks in a message.
SHOWN = 5


class TextFolder(TextTasks):
    """Your own texts by source: an author, a speaker, a language, a list.

    `path` is a folder, each file or folder in it a task; or a `.csv` or `.jsonl` with a column for the task and one for
    the text. Where a folder holds folders called `train`, `validation` (or `val`, `valid`, `dev`) and `test`, the tasks
    are theirs. Otherwise they are split in a fixed order: 64 % train, 16 % validation, 20 % test.

    Files that are binary, empty or no UTF-8 are left out, each with a line in the log. So are tasks with too little
    text, after the split: a task stays in its split whatever `k_shot`, `k_query`, `length` and `tokens` are.

    Args:
        path: the folder or the table.
        k_shot, k_query, length, tokens: see `TextTasks`.
        running: whether the texts of a task are one stream, as a book's paragraphs are, or a list, as names are.
        unit: of text in a file: a `line`, a `paragraph` or the whole `file`; in a table it is the cell.
        task_column, text_column: of a table.
    """

    divided_by = ("task_column", "text_column")  # rows without a text are left out before the split

    def __init__(
        self,
        path: str | Path | None,
        *,
        k_shot: int,
        k_query: int,
        length: int,
        running: bool = True,
        unit: Unit = "line",
        task_column: str = "task",
        text_column: str = "text",
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__(k_shot=k_shot, k_query=k_query, length=length, running=running, tokens=tokens)
        check_unit(unit)
        if path is None:
            raise InvalidValue("path", path, NEEDED)
        self.path, self.unit = Path(path).expanduser(), unit
        self.columns = task_column, text_column
        self.settings = "texts", str(path), k_shot, k_query, length, running, unit, task_column, text_column
        self.read_windows: dict[str, Windows] = {}  # by source, until they are asked for

    def load(self, split: Split) -> list[Source]:
        return self.splits[split]

    def _of(self, split: Split) -> tuple[list[Source], Rows]:
        is_plain = type(self) is TextFolder and type(self.tokens) is Bytes  # a subclass may read otherwise
        if not self._loaded and is_plain and self.path.exists():
            self._loaded = read_once(self.settings, self.files(), self.all_rows)
        return super()._of(split)

    def all_rows(self) -> dict[Split, tuple[list[Source], Rows]]:
        """The sources and the rows of every split: other objects share them, and none has one to add."""
        splits: tuple[Split, ...] = get_args(Split)
        for split in splits:
            super()._of(split)
        return self._loaded

    def files(self) -> list[Path]:
        """All files that are read."""
        if not self.path.is_dir():
            return [self.path]
        return [file for entry in visible(self.path) for file in files_of(entry) if file.is_file()]

    def distinct_windows(self, source: Source) -> Windows:
        found = self.read_windows.pop(source.name, None)
        return super().distinct_windows(source) if found is None else found

    @cached_property
    def splits(self) -> dict[Split, list[Source]]:
        """The usable sources of every split."""
        if not self.path.exists():
            raise InvalidValue("path", self.path, missing(self.path, "folder or file", NEEDED))
        if not self.path.is_dir():
            check_file(self.path)
        if self.path.is_file() and self.path.suffix not in TABLES:
            raise InvalidValue("path", self.path, f"must be a folder, or a file that ends in {' or '.join(TABLES)}")
        if self.path.is_dir():
            given = in_split_folders(self.path, lambda folder: self.usable(self.read(folder)), "a task has one split")
            if given and (empty := [split for split, sources in given.items() if not sources]):
                raise UserError(f"task.path={self.path}: there is no task for {empty[0]} that can be used")
            for entry in visible(self.path) if given else ():
                if not entry.is_dir():
                    log.warning("%s: stands beside folders of splits: left out", entry)
            if given:
                return given
        return self.divided({source.name: source for source in self.read(self.path)})

    def divided(self, sources: Mapping[str, Source]) -> dict[Split, list[Source]]:
        """The usable sources of every split: the split is that of all sources, whichever are usable."""
        names = split_by_hash(sources)
        if not all(names.values()):
            order = [name for split in names.values() for name in split]
            names = {"train": order[:-2], "validation": order[-2:-1], "test": order[-1:]}
        splits = {split: self.usable(sources[name] for name in chosen) for split, chosen in names.items()}
        count, rows = sum(map(len, splits.values())), f"{self.k_shot + self.k_query} rows of {self.length} tokens"
        if count < 3:
            needs = f"at least 3 with {rows} are needed"
            raise UserError(f"task.path={self.path}: holds {count} tasks that can be used, and {needs}")
        if empty := [split for split, found in splits.items() if not found]:
            short = ", ".join(names[empty[0]][:SHOWN])
            why = f"no task for {empty[0]} has {rows} ({short}): remove short ones, or lower k_shot, k_query or length"
            raise UserError(f"task.path={self.path}: {why}")
        return splits

    def read(self, path: Path) -> Iterator[Source]:
        """The sources of a table or a folder."""
        if path.is_file():
            with stage(f"reading {path}"):
                yield from table_sources(path, *self.columns)
            return
        entries = {entry: files_of(entry) for entry in visible(path)}
        check_size(path, sum(file.stat().st_size for files in entries.values() for file in files if file.is_file()))
        with stage(f"reading {path}", sum(map(len, entries.values()))) as at:
            for entry, files in entries.items():
                texts = []
                for file in files:
                    texts += self.texts_of(file)
                    at.done += 1
                if texts:
                    yield Source(entry.name, texts)

    def texts_of(self, file: Path) -> list[str]:
        """The texts of a file; none, and a line in the log, where it holds none that can be read."""
        try:
            texts = units(read_text(file), self.unit)
        except UserError as error:
            log.warning("%s: left out", error)
            return []
        if not texts:
            log.warning("%s: is empty: left out", file)
        return texts

    def usable(self, sources: Iterable[Source]) -> list[Source]:
        """The sources with rows enough, and a line in the log for each other."""
        found, need = [], self.k_shot + self.k_query
        for source in sources:
            windows = self.distinct_windows(source)
            rows = len(windows.lengths)
            if rows >= need:
                found.append(source)
                self.read_windows[source.name] = windows
            else:
                what = f"{rows} rows of {self.length} tokens, and {self.k_shot} + {self.k_query} are needed"
                log.warning("%s: %s: too short, %s: left out", self.path, source.name, what)
        return found


def files_of(entry: Path) -> list[Path]:
    """The files of a task: those in its folder, or its own."""
    if not entry.is_dir():
        return [entry]
    return sorted((file for file in entry.rglob("[!.]*") if file.is_file()), key=composed_parts)


def table_sources(path: Path, task_column: str, text_column: str) -> list[Source]:
    """The texts of a table by task, in the order in which they stand there."""
    found: dict[str, list[str]] = {}
    for where, row in TABLES[path.suffix](path):
        for column in (task_column, text_column):
            if row.get(column) is None:
                there = ", ".join(str(name) for name in row)
                what = f"has no {column}; there are {there} (task.task_column, task.text_column)"
                raise UserError(f"{path}: {where}: {what}")
        if text := str(row[text_column]).strip():
            found.setdefault(composed(str(row[task_column])), []).append(text)
    return [Source(name, texts) for name, texts in found.items()]


def table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where it stands, and each row of a CSV with a header."""
    rows = parsed_csv(read_text(path), str(path))
    _, header = next(rows, (0, []))
    for line, row in rows:
        if row:
            yield f"line {line}", dict(zip(header, row, strict=False))


def json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where it stands, and each object of a file with a JSON object per line."""
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: cannot be read as JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}: line {number}: must be an object, as in {{"task": ..., "text": ...}}')
        yield f"line {number}", row


#: Readers of tables, by the end of the file's name.
TABLES: dict[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]] = {".csv": table_rows, ".jsonl": json_rows}
