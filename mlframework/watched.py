"""Numbers that know whether anybody has computed with them, which a graph would take for constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Watched", "watched"]


class Watched(int):
    """A number that knows whether anybody has computed or compared with it."""

    touched = False


def watched(value: Any) -> Any:
    """A whole number to be watched; anything else as it is."""
    return Watched(value) if type(value) is int else value


def watch(name: str) -> Callable[..., Any]:
    def method(self: Watched, *args: Any) -> Any:
        self.touched = True
        return getattr(int, name)(self, *args)

    return method


for operation in ("lt", "le", "gt", "ge", "eq", "ne", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv"):
    setattr(Watched, f"__{operation}__", watch(f"__{operation}__"))
for operation in ("rtruediv", "floordiv", "mod", "pow", "rpow", "bool", "int", "float", "index", "hash", "neg"):
    setattr(Watched, f"__{operation}__", watch(f"__{operation}__"))
