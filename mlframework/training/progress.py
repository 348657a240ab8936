"""The progress bar of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress", "training_progress"]


class TrainingProgress:
    """A bar of outer steps with the current loss and the tasks per second; plain lines where there is no terminal."""

    def __init__(self, bar: Progress, row: TaskID) -> None:
        self.bar, self.row = bar, row

    def advance_to(self, step: int) -> None:
        self.bar.update(self.row, completed=step)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.console.print(line, highlight=False)

    def show(self, text: str) -> None:
        """The text at the bar's end."""
        self.bar.update(self.row, note=text)


@contextmanager
def training_progress(total: int, done: int) -> Iterator[TrainingProgress]:
    """A bar for `total` outer steps, of which `done` are behind us."""
    columns = (TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        yield TrainingProgress(bar, bar.add_task("steps", total=total, completed=done, note=""))
