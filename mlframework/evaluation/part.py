"""The interfaces of baselines, measures and displays, which config chooses, and their common base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, get_args

from torch import Tensor

from mlframework.episode import Episode, Kind, Split
from mlframework.errors import UserError
from mlframework.evaluation.choices import Trial
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.report import Measured, MethodResult
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution

if TYPE_CHECKING:
    # matplotlib takes half a second to import, which a training need not wait for: displays import it when they draw.
    from matplotlib.figure import Figure

__all__ = ["Baseline", "Display", "EvaluationPart", "Log", "Measure", "Validated"]


class EvaluationPart:
    """A part that goes with some tasks; others are refused before anything is trained."""

    #: The kinds of task that it is for.
    kinds: tuple[Kind, ...] = get_args(Kind)

    def check(self, task: TaskDistribution) -> None:
        """Refuses a task that the part is not for: a `UserError` says why."""
        if task.spec.kind not in self.kinds:
            raise UserError(f"is for a {' or a '.join(self.kinds)}, and {type(task).__name__} is a {task.spec.kind}")


class Baseline(EvaluationPart, ABC):
    """A method that an evaluation judges beside the trained algorithm, on the same tasks."""

    @abstractmethod
    def rows(self, name: str, trial: Trial) -> Iterable[MethodResult]:
        """Rows of the report: settings chosen by `trial.choose`, judged by `trial.row`; `name` is its config key."""


class Measure(EvaluationPart, ABC):
    """A table about a quality that no query metric shows, as that of generated texts."""

    @abstractmethod
    def measure(self, meta_layer: MetaLayer, split: Split, steps: int) -> Measured | None:
        """Intervals by column and row after some inner steps on tasks of a split; None if nothing can be measured."""


class Log(Protocol):
    """Where a display writes; the tags are those of TensorBoard, such as `validation/tasks`."""

    def figure(self, tag: str, figure: Figure, step: int) -> None: ...

    def text(self, tag: str, text: str, step: int | None = None) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None: ...


class Validated(NamedTuple):
    """A validation, for displays."""

    meta_layer: MetaLayer  # the algorithm, in evaluation mode
    episode: Episode  # the first validation tasks, on its device
    by_step: Mapping[str, Sequence[Interval]]  # each query metric over all validation tasks after 0, 1, ... inner steps
    step: int  # outer steps so far


class Display(EvaluationPart, ABC):
    """Writes figures, texts or curves of a validation."""

    @abstractmethod
    def show(self, validated: Validated, log: Log) -> None:
        """Writes to the log; parameters, buffers and random numbers stay as they are."""
