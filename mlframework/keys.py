"""What this user alone can have written: signatures by a key of their own, and folders that nobody else writes to.

Files from a shared cache or from somebody's run folder run no code unless such a signature proves that this user wrote
them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import pwd
import secrets
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["LENGTH", "is_signed", "key_file", "private_folder", "sign"]

#: Bytes of a key, and of a signature.
LENGTH = 32

#: The bits of a file's mode that let the group and others write; those that let them do anything.
WRITABLE, OPEN = 0o022, 0o077

log = logging.getLogger(__name__)


def key_file() -> Path:
    """`$MLFRAMEWORK_KEY`, else `mlframework/key` in `$XDG_CONFIG_HOME` or `~/.config`."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.environ.get("MLFRAMEWORK_KEY") or f"{folder}/mlframework/key").expanduser()


def sign(*parts: str | bytes) -> bytes | None:
    """The signature of texts in this order, HMAC-SHA256 by the user's key; None where there can be no key."""
    key = user_key()
    if key is None:
        return None
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big"))  # ("a", "b") and ("ab", "") differ
        digest.update(content)
    return digest.digest()


def is_signed(signature: bytes, *parts: str | bytes) -> bool:
    """Whether `sign` gave this signature to these texts, for this user."""
    own = sign(*parts)
    return own is not None and hmac.compare_digest(own, signature)


def user_key() -> bytes | None:
    """The key in the user's file, which is made when it is first needed; None where it cannot be kept secret."""
    try:
        path = key_file()
        if not path.exists():
            make_key(path)
        return read_key(path)
    except (OSError, RuntimeError) as error:  # a home that is not there, or cannot be written
        log.debug("no key: %s", error)
        return None


def make_key(path: Path) -> None:
    """Writes a new key that only this user can read; a key that another process wrote meanwhile stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(LENGTH))
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_key(path: Path) -> bytes | None:
    """The key in a file; None, with a warning, if others could have read or written it."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        about, key = os.fstat(file.fileno()), file.read(LENGTH + 1)
    if about.st_uid != os.geteuid() or about.st_mode & OPEN or len(key) != LENGTH:
        warn_once(f"{path}: is not used: it must hold {LENGTH} bytes that only you can read (chmod 600): delete it")
        return None
    return key


@cache
def warn_once(line: str) -> None:
    log.warning(line)


def private_folder(path: Path) -> Path | None:
    """The folder, made if need be; None if anybody else can put files in it, or another folder in its place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.parent.resolve() / path.name  # a link on the way could lead elsewhere later
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        about = path.lstat()
        own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & WRITABLE
        return path if own and all(map(is_safe, path.parents)) else None
    except OSError as error:
        log.debug("%s is no folder of one's own: %s", path, error)
        return None


def is_safe(folder: Path) -> bool:
    """Whether only this user and root can replace what is theirs in a folder."""
    about = folder.stat()
    if about.st_uid not in (0, os.geteuid(), unmapped_user()):
        return False
    if about.st_mode & stat.S_ISVTX:  # as in /tmp: everybody can add, and nobody can replace
        return True
    by_group = about.st_mode & stat.S_IWGRP and about.st_gid not in own_groups()
    return not (about.st_mode & stat.S_IWOTH or by_group)


def own_groups() -> tuple[int, ...]:
    """Root's group, and the user's own where it bears the user's number, as Linux gives them."""
    with suppress(KeyError):  # no such user, as in some containers
        group = pwd.getpwuid(os.geteuid()).pw_gid
        return (0, group) if group == os.geteuid() else (0,)
    return (0,)


@cache
def unmapped_user() -> int:
    """The number under which a container without root's rights shows root's files."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 0
