"""Predicted against true: values of a regression, classes of a classification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlframework.episode import Episode
from mlframework.evaluation.displays import drawing
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.meta_layers.meta_layer import MetaLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Predictions", "confusion", "predicted_against_true"]

#: The most classes with a name and a number in each cell.
MOST_CLASSES = 20


class Predictions(Display):
    """Draws the predictions for the queries of the first validation tasks; see `predicted_against_true`."""

    kinds = ("classification", "regression")

    def show(self, validated: Validated, log: Log) -> None:
        log.figure(
            "validation/predictions", predicted_against_true(validated.meta_layer, validated.episode), validated.step
        )


def predicted_against_true(meta_layer: MetaLayer, episode: Episode) -> Figure:
    """Axes before and after adaptation: points on predicted against true, or a table of predicted against true classes.

    Each task of a regression has its colour. The first output alone is drawn.
    """
    models = drawing.some_models(meta_layer, episode)
    last = max(models)
    shown = dict.fromkeys((0, last))
    figure = drawing.new_figure(4.2 * len(shown), 4.2)
    draw = draw_classes if meta_layer.task.spec.kind == "classification" else draw_values
    for number, step in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        draw(axes, drawing.predictions(meta_layer, models[step], episode), episode)
        drawing.tidy(axes, "true", "predicted")
        axes.set_title(drawing.after_steps(step, last), fontsize=10)
    return figure


def draw_values(axes: Axes, predicted: Tensor, episode: Episode) -> None:
    """Points of each task's queries; `predicted` is `[tasks, n, out_features]`."""
    for y, found, counts in zip(episode.query.y.cpu(), predicted.cpu(), episode.query.mask.cpu() > 0, strict=True):
        axes.scatter(y[counts, 0], found[counts, 0], s=14, alpha=0.7)
    low, high = (float(bound) for bound in torch.aminmax(episode.query.y[episode.query.mask > 0][:, 0]))
    axes.plot([low, high], [low, high], "--", color=drawing.GREY, linewidth=1)


def draw_classes(axes: Axes, logits: Tensor, episode: Episode) -> None:
    """A table whose columns are the true classes; `logits` are `[tasks, n, classes]`."""
    counts = confusion(logits, episode)
    axes.imshow((counts / counts.sum(0).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(counts) > MOST_CLASSES:
        return
    axes.set_xticks(range(len(counts)))
    axes.set_yticks(range(len(counts)))
    for predicted, row in enumerate(counts.tolist()):
        for true, count in enumerate(row):
            axes.text(true, predicted, str(count), ha="center", va="center", color=drawing.INK, fontsize=8)


def confusion(logits: Tensor, episode: Episode) -> Tensor:
    """How many queries of each true class (columns) have each prediction (rows), `[classes, classes]`, on the CPU."""
    kept, classes = episode.query.mask > 0, logits.shape[-1]
    pairs = logits.argmax(-1)[kept] * classes + episode.query.y[kept]
    return torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes)
