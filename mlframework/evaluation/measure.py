"""The interface of a measure: a table of the trained algorithm beside the rows of a report."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mlframework.episode import Split
from mlframework.evaluation.part import EvaluationPart
from mlframework.evaluation.report import Measured
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["Measure"]


class Measure(EvaluationPart, ABC):
    """Measures a quality that no query metric shows, as that of generated texts."""

    @abstractmethod
    def measure(self, meta_layer: MetaLayer, split: Split, steps: int) -> Measured | None:
        """Intervals by column and row; None where there is nothing to measure.

        Args:
            meta_layer: the trained algorithm.
            split: of the tasks to look at.
            steps: inner steps by which it adapts.
        """
