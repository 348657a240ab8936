"""The interface of a display: figures, texts or curves of some validations of a training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mlframework.episode import Episode
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.part import EvaluationPart
from mlframework.meta_layers.meta_layer import MetaLayer

if TYPE_CHECKING:
    # matplotlib takes half a second to import, which a training need not wait for: displays import it when they draw.
    from matplotlib.figure import Figure

__all__ = ["Display", "Log", "Validated"]


class Log(Protocol):
    """Where a display writes; the tags are those of TensorBoard, such as `validation/tasks`."""

    def figure(self, tag: str, figure: Figure, step: int) -> None: ...

    def text(self, tag: str, text: str, step: int | None = None) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...


class Validated(NamedTuple):
    """A validation, for displays.

    Attributes:
        meta_layer: the algorithm, in evaluation mode.
        episode: the first validation tasks, on its device.
        by_step: each query metric's intervals over all validation tasks after 0, 1, ... inner steps.
        step: outer steps so far.
    """

    meta_layer: MetaLayer
    episode: Episode
    by_step: Mapping[str, Sequence[Interval]]
    step: int


class Display(EvaluationPart, ABC):
    """Writes figures, texts or curves of a validation."""

    @abstractmethod
    def show(self, validated: Validated, log: Log) -> None:
        """Writes to the log; parameters, buffers and random numbers stay as they are."""
