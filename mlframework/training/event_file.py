"""TensorBoard's event files: written by the thread that trains, and cut to a checkpoint when a run goes on."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from mlframework.errors import UserError
from mlframework.files import naming

__all__ = ["EventFile", "cut_events", "event_files"]

#: Seconds after which the events so far are written to the disk, for readers that wait for them.
FLUSH_SECONDS = 20.0

#: Bytes of a record around its content: the length, and checksums of the length and of the content.
LENGTH, CHECKSUM = 8, 4

#: Tells the files of one process apart.
NUMBERS = itertools.count()


class EventFile:
    """A new file of events, which TensorBoard reads after those that are in the folder already.

    The writers of torch and of TensorBoard leave the work to a thread. On a full disk the thread prints a traceback,
    and the training learns of it late, without the name of the file.

    Args:
        start: readers drop what older files hold beyond this step; 0 drops all, None nothing.
        suffix: the end of the file's name.
    """

    def __init__(self, folder: Path, *, start: int | None = None, suffix: str = "") -> None:
        place = f"{socket.gethostname()}.{os.getpid()}.{next(NUMBERS)}"
        self.path = folder / f"events.out.tfevents.{second_after(folder):010d}.{place}{suffix}"
        self.file = self.path.open("wb")
        self.records = RecordWriter(self.file)
        self.flushed = 0.0
        self.write(Event(file_version="brain.Event:2"))
        if start is not None:
            self.write(Event(session_log=SessionLog(status=SessionLog.START), step=start + 1 if start else 0))

    def add(self, summary: Summary, step: int | None = None) -> None:
        self.write(Event(summary=summary, step=step or 0))

    def write(self, event: Event) -> None:
        """Writes an event; the error of a full disk may also come later, from `flush` or `close`."""
        event.wall_time = time.time()
        with self.named():
            self.records.write(event.SerializeToString())
            if event.wall_time - self.flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Returns once all events are in the file."""
        with self.named():
            self.file.flush()
        self.flushed = time.time()

    def close(self) -> None:
        with self.named():
            self.file.close()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Adds the name of the file to an error of the system, after which nothing more is written."""
        try:
            with naming(self.path):
                yield
        except OSError:
            with suppress(OSError):
                self.file.close()
            raise


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder, in the order in which TensorBoard reads them."""
    return sorted(folder.glob("events.out.tfevents.*"))


def second_after(folder: Path) -> int:
    """The present second, which stands in a file's name, or a later one: readers sort files by their names."""
    seconds = [path.name.split(".")[3] for path in event_files(folder)]
    return max(int(time.time()), *(int(second) + 1 for second in seconds if second.isdecimal()), 0)


def cut_events(folder: Path, step: int) -> None:
    """Removes the events beyond a step, and the rest of a record whose writer was killed.

    The steps of a file only grow, until a run ends: all after the first event beyond the step is removed.
    """
    for path in event_files(folder):
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if (end := end_of(file, size, step)) < size:
                file.truncate(end)


def opened(path: Path) -> BinaryIO:
    """A file of the folder itself, to be cut; behind a link may be a file of somebody else's.

    Raises:
        UserError: it is a link, a pipe or a folder.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{path}: is no plain file, and would be cut to the checkpoint: move it away")
    return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), "r+b")


def end_of(file: BinaryIO, size: int, step: int) -> int:
    """Where the last whole record before the first event beyond a step ends, in a file of so many bytes."""
    end, head = 0, LENGTH + CHECKSUM
    while len(header := file.read(head)) == head:
        length = int.from_bytes(header[:LENGTH], "little")
        if masked_crc32c(header[:LENGTH]) != int.from_bytes(header[LENGTH:], "little"):
            break
        if length + CHECKSUM > size - file.tell():
            break
        content = file.read(length + CHECKSUM)
        if not within(content[:-CHECKSUM], step):
            break
        end = file.tell()
    return end


def within(content: bytes, step: int) -> bool:
    """Whether a record is an event that is not beyond a step."""
    try:
        return bool(Event.FromString(content).step <= step)
    except Exception:  # protobuf's own, of a package that only TensorBoard names
        return False
