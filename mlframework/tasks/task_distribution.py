"""The one interface of all domains: a distribution over tasks, from which episodes are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from mlframework.episode import Episode, Split, TaskSpec, masked_mean
from mlframework.files import KeepsArguments

__all__ = ["TaskDistribution"]


class TaskDistribution(KeepsArguments, ABC):
    """A distribution over tasks.

    A subclass sets `spec` in its constructor and implements `sample`; the loss and the metrics follow from
    `spec.kind` unless it overrides them. Constructors check and store: data is read at the first `sample`.
    """

    spec: TaskSpec

    #: Metrics of which more is better; of all others, the loss included, less is.
    higher_is_better: frozenset[str] = frozenset({"accuracy"})

    @abstractmethod
    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        """Draws a meta-batch. All randomness comes from `generator`: same state, same episode.

        Args:
            num_tasks: tasks in the episode.
            split: which tasks: those to meta-train on, to choose by, or to report.
            generator: a CPU generator.

        Returns:
            An episode on the CPU whose leaves start with `[num_tasks]`.
        """

    def drawn_from(self, num_tasks: int, split: Split, generator: torch.Generator) -> list[tuple[str, ...]] | None:
        """The sources of the tasks that `sample` would draw with the same arguments: languages, roles, characters.

        Two tasks with a common source are not independent, which an interval must know. None: each task is a source of
        its own.
        """
        return None

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """The loss of each example (and position), `[...]`: squared error, or cross-entropy in nats.

        Args:
            prediction: `[..., out_features]`.
            y: `[..., out_features]` for a regression, else class ids `[...]`.
        """
        if self.spec.kind == "regression":
            squares = F.mse_loss(prediction, y, reduction="none")
            return squares.squeeze(-1) if squares.shape[-1] == 1 else squares.mean(-1)
        return F.cross_entropy(prediction.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)

    def metrics(self, prediction: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Further scores `[...]` per example (and position), with the arguments of `loss`; `accuracy` for classes."""
        if self.spec.kind == "regression":
            return {}
        return {"accuracy": (prediction.argmax(-1) == y).to(prediction.dtype)}

    def scores(self, prediction: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The scores of each task `[tasks]`: means of the loss and the metrics over the examples that count.

        Overridden where a number is no mean over examples, as bits per character are not. `loss` is among the names.

        Args:
            prediction, y: as in `loss`, with `[tasks, n]` in front.
            mask: `[tasks, n, ...]`, 1 counts, 0 does not; not read where the spec says that tasks are not ragged.
        """
        values = {"loss": self.loss(prediction, y), **self.metrics(prediction, y)}
        return {name: masked_mean(value, mask if self.spec.ragged else None) for name, value in values.items()}
