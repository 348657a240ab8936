"""Numbers that notice when Python code computes with them, since a graph would hold them as constants.

They do not notice everything: torch and C code read a number directly, as `tensor * n` does. So functions are traced
with another number as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["TracedInt", "traced_int"]


class TracedInt(int):
    """A number that notices when code computes or compares with it."""

    touched = False


def traced_int(value: Any, ahead: int = 0) -> Any:
    """An int as a `TracedInt`, increased by `ahead`; any other value as it is."""
    return TracedInt(value + ahead) if type(value) is int else value


def watch(name: str) -> Callable[..., Any]:
    def method(self: TracedInt, *args: Any) -> Any:
        self.touched = True
        return getattr(int, name)(self, *args)

    return method


BINARY = "add sub mul truediv floordiv mod divmod pow lshift rshift and or xor"
OTHERS = "lt le gt ge eq ne neg pos abs invert bool int float index hash round trunc floor ceil str repr format"
for operation in (*BINARY.split(), *(f"r{name}" for name in BINARY.split()), *OTHERS.split()):
    setattr(TracedInt, f"__{operation}__", watch(f"__{operation}__"))
