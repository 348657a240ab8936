"""The state of the git checkout in the working directory; nothing that its own settings name is run."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["first_git_state", "git_state"]

#: The checkout may be somebody else's: its settings can name programs that `git status` runs.
SAFE = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")

#: Whose settings are the checkout's own, as git calls it.
OWN = ("local", "worktree")


def git_state() -> dict[str, Any]:
    """The commit of the working directory, None where it is no git checkout, and whether files differ from it."""
    if (commit := git("rev-parse", "HEAD")) is None:
        return {"commit": None, "changed": False}
    # A submodule has settings of its own: only its commit is compared.
    status = git("status", "--porcelain", "--ignore-submodules=dirty", off=own_filters())
    return {"commit": commit, "changed": bool(status)}


def first_git_state() -> dict[str, Any]:
    """The state as it was when this process first asked in the working directory: it runs the code that it found then.

    Three processes of git take longer than the rest of a run's records, and a sweep has many jobs.
    """
    with suppress(FileNotFoundError):  # the working directory has been removed
        return dict(state_in(os.getcwd()))
    return git_state()


@functools.cache
def state_in(_folder: str) -> Mapping[str, Any]:
    """The state of the working directory, which is the key."""
    return git_state()


def own_filters() -> list[str]:
    """The settings by which the checkout names programs that rewrite files before they are compared."""
    said = git("config", "--show-scope", "--name-only", "-z", "--get-regexp", r"^filter\.") or ""
    words = said.split("\0")
    return [name for scope, name in zip(words[::2], words[1::2], strict=False) if scope in OWN]


def git(*command: str, off: Sequence[str] = ()) -> str | None:
    """What git says, with some settings switched off; None if it fails."""
    settings = {"GIT_CONFIG_COUNT": str(len(off))}
    for number, name in enumerate(off):
        settings |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": ""}
    words, where = ["git", *SAFE, *command], {**os.environ, **(settings if off else {})}
    try:
        return subprocess.run(words, env=where, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
