"""Curves, figures and the config of a run, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger:
    """Writes TensorBoard events into the run's own folder.

    Args:
        folder: the run folder.
        start: the step from which this process writes; what an interrupted process wrote beyond it is dropped.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve; names are tags, such as `train/query_loss`."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A picture."""
        self.writer.add_figure(tag, figure, step)

    def text(self, tag: str, text: str) -> None:
        """A text in markdown."""
        self.writer.add_text(tag, text)

    def close(self) -> None:
        self.writer.close()
