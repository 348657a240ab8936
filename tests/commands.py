"""The command lines, run in this process as their console scripts run them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

#: A training of a second.
SHORT = (
    *("trainer.steps=2", "trainer.meta_batch=2", "trainer.validation_tasks=4", "trainer.validate_every=2"),
    *("trainer.checkpoint_every=2", "logger.figures=false"),
)


class Said(NamedTuple):
    """What a command printed, and how it ended."""

    exit_code: int
    out: str
    err: str


def call(main: Callable[[], None], *arguments: str, folder: Path) -> Said:
    """Runs a command in a folder."""
    out, err = io.StringIO(), io.StringIO()
    exit_code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["mlframework", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        try:
            main()
        except SystemExit as end:
            exit_code = int(end.code or 0)
    return Said(exit_code, out.getvalue(), messages(err.getvalue()))


def messages(err: str) -> str:
    """What a command wrote on stderr, without the lines that say what it is doing: these depend on its speed."""
    return re.sub(r"^\[ *[0-9:]+ (s|min|h)\] .*\n", "", err, flags=re.MULTILINE)
