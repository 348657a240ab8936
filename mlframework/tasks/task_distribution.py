"""The one interface of all domains: a distribution over tasks, from which episodes are drawn."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlframework.episode import Episode, Split, TaskSpec, masked_mean
from mlframework.errors import part_of
from mlframework.files import KeepsArguments
from mlframework.tasks.own_data import as_class_ids, as_inputs, as_values
from mlframework.tasks.own_episodes import as_episode

__all__ = ["TaskDistribution"]


class TaskDistribution(KeepsArguments, ABC):
    """A distribution over tasks.

    A subclass sets `spec` in its constructor and implements `sample`; the loss and the metrics follow from
    `spec.kind` unless it overrides them. Constructors check and store: data is read at the first `sample`.
    """

    spec: TaskSpec

    #: Metrics of which more is better; of all others, the loss included, less is.
    higher_is_better: frozenset[str] = frozenset({"accuracy"})

    #: Settings that say which data belong to which split: test tasks under one value may be training tasks of another.
    #: Number, size and form of the examples belong here only if another value moves a task to another split.
    divided_by: tuple[str, ...] = ()
    #: Names of classes that keep their number from task to task; None: each task numbers its own.
    class_names: tuple[str, ...] | None = None
    #: Whether a task's own support set says how its numbers are scaled, as in a table that nobody has seen.
    scaled_by_support: bool = False
    #: Whether a user's inputs may hold NaN for a missing value.
    takes_missing: bool = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """What a subclass draws is converted, so that it may return tuples, arrays and numbers of other widths."""
        super().__init_subclass__(**keywords)
        if "sample" in vars(cls):
            cls.sample = converted(vars(cls)["sample"])  # type: ignore[method-assign]

    @abstractmethod
    def sample(self, num_tasks: int, split: Split, generator: torch.Generator) -> Episode:
        """Draws a meta-batch. All randomness comes from `generator`: same state, same episode.

        Args:
            num_tasks: tasks in the episode.
            split: which tasks: those to meta-train on, to choose by, or to report.
            generator: a CPU generator.

        Returns:
            An episode on the CPU whose leaves start with `[num_tasks]`. Plain tuples, arrays and numbers of other
            widths are converted: float64 is rounded to torch's default dtype. See `as_episode`.
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

    # A user's own examples of a new task. Where `scaled_by_support`, the support set's own numbers are given as well.

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        """A user's own inputs as the task's: `[n, *x_shape]`, from whatever holds them.

        Args:
            support: the support inputs as numbers, before they are scaled; None: `x` are the support inputs.
        """
        return as_inputs(x, self.spec)

    def encode_targets(self, y: Any, support: Tensor | None = None) -> Tensor:
        """A user's own targets as the task's: values `[n, out_features]`, or class ids `[n]`."""
        return as_values(y, self.spec) if self.spec.kind == "regression" else as_class_ids(y, self.spec)

    def decode_values(self, values: Tensor, support: Tensor | None = None) -> Tensor:
        """Predicted values `[n, out_features]` of a regression in the user's own units, by a scale and an offset."""
        return values

    def decode_variance(self, variance: Tensor, support: Tensor | None = None) -> Tensor:
        """Variances `[n, out_features]` in the square of the user's own units."""
        zero = torch.zeros_like(variance)
        scale = self.decode_values(zero + 1, support) - self.decode_values(zero, support)
        return variance * scale.square()

    # What a run in use knows of data that it does not have.

    def kept(self) -> dict[str, Any]:
        """What using a trained run needs from the data, as JSON; empty if the constructor's settings are enough."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Takes over what `kept` gave, so that the data is not read until tasks are drawn."""


def converted(sample: Callable[..., Any]) -> Callable[..., Episode]:
    """A method `sample` whose result is an episode, if it can be made one; an abstract one stays abstract."""

    @functools.wraps(sample)
    def sample_converted(self: TaskDistribution, *args: Any, **keywords: Any) -> Episode:
        drawn = sample(self, *args, **keywords)
        with part_of(f"task ({type(self).__name__})"):
            return as_episode(drawn, self.spec)

    return sample_converted
