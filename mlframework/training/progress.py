"""The progress bar of a training."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress"]


class TrainingProgress(Progress):
    """A bar of `total` outer steps, of which `done` are behind us; plain lines where there is no terminal."""

    def __init__(self, total: int, done: int) -> None:
        columns = (TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self.row = self.add_task("steps", total=total, completed=done, note="")
