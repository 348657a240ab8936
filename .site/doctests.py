"""Doctests in docstrings as blocks of code, wherever in the docstring they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^>>>.*\n?(?:^(?!>>>).+\n?)*)+", re.MULTILINE)


class FencedDoctests(griffe.Extension):
    """Puts fences around doctests."""

    def on_instance(self, *, obj: griffe.Object, **rest: Any) -> None:
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(
                lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value
            )
