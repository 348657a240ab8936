"""Errors of one line each: the user's faults (exit code 2), failed runs (1), and faults of the machine (75)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

__all__ = [
    *("FailedRun", "IncompatibleKind", "IncompatibleTask", "InvalidData", "InvalidValue", "MachineFault", "UserError"),
    *("nearest", "part_of"),
]

#: A task of each kind that needs no data.
EXAMPLES = {"classification": "task=glyphs", "regression": "task=sinusoid", "sequence": "task=text_lists"}


class UserError(Exception):
    """Bad input: one line that names the override or the file, and a right value."""

    exit_code = 2


class InvalidValue(UserError):
    """A constructor's argument that cannot be used.

    The command line joins `field`, the constructor's keyword, to the config key of the object that refused it, so that
    the user reads `task.k_shot=0: must be at least 1`; `why` says which values are right.
    """

    def __init__(self, field: str, value: object, why: str) -> None:
        super().__init__(f"{field}={value}: {why}")
        self.field, self.value, self.why = field, value, why


class InvalidData(InvalidValue, ValueError):
    """Data that a user hands over, such as `x`, and that cannot be converted exactly.

    It is a `ValueError` as well, which scikit-learn expects.
    """


class IncompatibleTask(UserError):
    """A task, a base layer and an algorithm that do not go together; the message names a choice that does."""


class IncompatibleKind(IncompatibleTask):
    """An algorithm that takes tasks of other `kinds` than the `kind` of the task, as the SVM takes no regression."""

    def __init__(self, algorithm: str, kinds: tuple[str, ...], task: str, kind: str) -> None:
        self.algorithm, self.kinds, self.task, self.kind = algorithm, kinds, task, kind
        super().__init__(self.told(algorithm, task))

    def told(self, algorithm: str, task: str) -> str:
        """The line, with the names by which the user knows the two."""
        takes = " and ".join(f"{kind} tasks" for kind in self.kinds)
        other = EXAMPLES[self.kinds[0]]
        return f"{algorithm} takes {takes}, and {task} is a {self.kind}: use {other}, or algorithm=maml"


class FailedRun(Exception):
    """A failure at run time, such as a loss that is no longer finite."""

    exit_code = 1


class MachineFault(Exception):
    """A full disk, a file that is gone, too little memory: the same command may go on once that is mended.

    The exit code is EX_TEMPFAIL of sysexits.h, by which a scheduler knows that it may try again.
    """

    exit_code = 75


def nearest(name: str, options: Collection[str]) -> str:
    """` (did you mean x?)` for the option most like `name`, or an empty string."""
    found = get_close_matches(name, list(options), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


@contextmanager
def part_of(key: str) -> Iterator[None]:
    """Puts the config key of a part before the line of a `UserError`; an `InvalidValue` finds its own key."""
    try:
        yield
    except InvalidValue:
        raise
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
