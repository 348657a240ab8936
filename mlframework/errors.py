"""What can go wrong, in one line each: the user's faults (exit code 2) and failures at run time (exit code 1)."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

__all__ = ["FailedRun", "IncompatibleTask", "InvalidValue", "UserError", "nearest"]


class UserError(Exception):
    """Bad input: one line that names the override or the file, and what would be right."""

    exit_code = 2


class InvalidValue(UserError):
    """A constructor's argument that cannot be used.

    The command line joins `field` to the config key of the object that refused it, so that the user reads
    `task.k_shot=0: must be at least 1`.

    Args:
        field: the constructor's keyword.
        value: what was given.
        why: what would be right.
    """

    def __init__(self, field: str, value: object, why: str) -> None:
        super().__init__(f"{field}={value}: {why}")
        self.field, self.value, self.why = field, value, why


class IncompatibleTask(UserError):
    """A task, a base layer and an algorithm that do not go together; the message names a choice that does."""


class FailedRun(Exception):
    """A failure at run time that is nobody's typing error, such as a loss that is no longer finite."""

    exit_code = 1


def nearest(name: str, options: Collection[str]) -> str:
    """` (did you mean x?)` for the option most like `name`, or an empty string."""
    found = get_close_matches(name, list(options), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
