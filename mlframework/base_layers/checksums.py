"""Checksums within files of weights, so that a damaged file is noticed, whichever bit is wrong.

A file of safetensors has its checksum in its metadata. The checksum is that of the whole file with zeros in its own
place. A file of `torch.save` is a zip archive; the checksum of all bytes before it is the archive's comment. Other
programs read both. Files without a checksum, older ones and those of other programs, are read without this check.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

__all__ = [
    *("DAMAGED", "PACKED", "has_checksum", "in_words", "is_packed", "load_tensors", "matches"),
    *("to_safetensors", "to_zip", "zip_matches"),
]

#: What is said of a damaged file.
DAMAGED = "its checksum does not match: the file is damaged"

#: What is said of an archive that `torch.save` cannot have written.
PACKED = "it unpacks to more bytes than it has: torch.save packs nothing"

#: What is said of a file that its reader cannot make out.
BROKEN = "the file is cut off, damaged, or of another format"

#: The name in the metadata of a file of safetensors, and the value as it is hashed.
NAME, ZEROS = "mlframework.checksum", f"sha256:{'0' * 64}"

#: The name and the value in the header. Quotes within a JSON string are escaped: this is found nowhere else.
ENTRY = re.compile(rb'"mlframework\.checksum":"sha256:([0-9a-f]{64})"')

#: What a single wrong bit in the entry leaves of it.
REMAINS = re.compile(rb'mlframework\.checksum|"sha256:[0-9a-f]{64}"')

#: A zip archive ends with the second signature, 16 bytes, two bytes that hold the comment's length, and the comment.
BEGIN, END, END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22


def in_words(error: Exception) -> str:
    """What is wrong with a file, by the error that reading it raised.

    >>> in_words(zipfile.BadZipFile("File is not a zip file"))
    'the file is cut off, damaged, or of another format'
    """
    if str(error) in (DAMAGED, PACKED):
        return str(error)
    return error.strerror if isinstance(error, OSError) and error.strerror else BROKEN


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file of safetensors with its checksum."""
    content = safetensors.torch.save(tensors, {**metadata, NAME: ZEROS})
    entry = ENTRY.search(content, 8, end_of_header(content))
    assert entry is not None
    digest = hashlib.sha256(content).hexdigest().encode()
    return b"".join((content[: entry.start(1)], digest, content[entry.end(1) :]))


def matches(content: bytes) -> bool:
    """Whether a file of safetensors is as it was written, or holds no checksum."""
    end = end_of_header(content)
    entry = ENTRY.search(content, 8, end)
    if entry is None:
        return not REMAINS.search(content, 8, end)
    digest = hashlib.sha256(content[: entry.start(1)])
    digest.update(b"0" * 64)
    digest.update(memoryview(content)[entry.end(1) :])
    return digest.hexdigest().encode() == entry[1]


def end_of_header(content: bytes) -> int:
    """Where the header of a file of safetensors ends, whose length is in the first eight bytes."""
    return min(8 + int.from_bytes(content[:8], "little"), len(content))


def to_zip(content: Any) -> list[bytes | memoryview]:
    """What `torch.save` makes of an object, with its checksum: the parts of the file, in their order."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()
    assert archive[-END_BYTES : -END_BYTES + 4] == END, "the archive has a comment already"
    comment = comment_of(hashlib.sha256(archive[:-2]).hexdigest())
    return [archive[:-2], len(comment).to_bytes(2, "little"), comment]


def comment_of(digest: str) -> bytes:
    return f"sha256:{digest}".encode()


def has_checksum(path: Path) -> bool:
    """Whether the file is an archive with a comment: with a checksum, or with what is left of it."""
    with path.open("rb") as file:
        begin, size = file.read(4), file.seek(0, io.SEEK_END)
        file.seek(max(0, size - END_BYTES))
        end = file.read()
    return begin == BEGIN and (end[:4] != END or end[-2:] != b"\0\0")


def is_packed(path: Path) -> bool:
    """Whether an archive unpacks to more bytes than it has: torch would fill the memory with it."""
    with path.open("rb") as file:
        if file.read(len(BEGIN)) != BEGIN:
            return False
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist()) > path.stat().st_size


def zip_matches(path: Path) -> bool:
    """Whether a file with what `to_zip` gave is as it was written; of one without a checksum, each record's CRC."""
    if not has_checksum(path):
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    comment, digest = len(comment_of("0" * 64)), hashlib.sha256()
    with path.open("rb") as file:
        left = file.seek(0, io.SEEK_END) - comment - 2
        file.seek(0)
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        return file.read() == comment.to_bytes(2, "little") + comment_of(digest.hexdigest())


def load_tensors(path: Path) -> Any:
    """The content of a file of `torch.save`: tensors and containers of them. Nothing in the file is run.

    Torch warns of another protocol of pickle, and asks for a report to its authors; the error says what is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
