"""Downloads: one that broke off goes on, and a file takes its name once its SHA-256 is right."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mlframework.errors import UserError
from mlframework.screen import stage

__all__ = ["download"]

#: Bytes that are read at a time.
CHUNK = 1 << 16


def download(url: str, path: Path, *, sha256: str, size: int, otherwise: str) -> None:
    """Fetches a file of `size` bytes with this SHA-256; it appears under its name whole or not at all.

    What an earlier try has fetched is not fetched again. `otherwise` is advice to the user if this fails, as in `put it
    into this folder`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part_for(path, sha256) as part:
            with appended(part) as file:
                there = fetch(url, file, size)
            if there < size:
                raise UserError(f"{url}: broke off after {there} of {size} bytes: try again, or {otherwise}")
            if (found := sha256_of(part)) != sha256:
                part.unlink()
                raise UserError(f"{url}: came with sha256 {found} instead of {sha256}: try again, or {otherwise}")
            os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # no network, a full disk, a folder that may not be written
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer as well, with an open connection
        raise UserError(f"{url}: cannot be downloaded to {path} ({error}): {otherwise}") from error


@contextmanager
def part_for(path: Path, sha256: str) -> Iterator[Path]:
    """The part of a file, which stays if the download breaks off; one that does not while another process has it."""
    part = path.with_name(f"{path.name}.{sha256[:32]}.part")
    with appended(part) as lock:
        if locked(lock, part):
            try:
                yield part
            finally:
                with suppress(FileNotFoundError):
                    if not part.stat().st_size:
                        part.unlink()
            return
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield own
    finally:
        own.unlink(missing_ok=True)


def appended(path: Path) -> IO[bytes]:
    """A file to append to, made if need be; a link, which others could have put there, and a pipe are errors."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def locked(file: IO[bytes], path: Path) -> bool:
    """Whether this process alone has an open file, and the file still has this name."""
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def fetch(url: str, file: IO[bytes], size: int) -> int:
    """Appends what a file lacks of `size` bytes, and at most one chunk more; returns how many it has then."""
    there = file.tell()
    if there >= size:
        return there
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        if there and response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server starts anew
            file.truncate(0)
            there = 0
        with stage(f"downloading {url.rsplit('/', 1)[-1]}, kilobytes", size // 1000 or None) as at:
            while there <= size and (chunk := response.read(CHUNK)):
                there += file.write(chunk)
                at.done = there / 1000
    return there


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
