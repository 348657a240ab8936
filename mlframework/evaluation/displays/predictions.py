"""Predicted against true: values of a regression, classes of a classification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlframework.episode import Episode
from mlframework.evaluation.displays import drawing
from mlframework.evaluation.displays.confusion import confusion, draw_confusion
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.meta_layers.meta_layer import MetaLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Predictions", "predicted_against_true"]


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

    def draw(axes: Axes, found: Tensor) -> None:
        if meta_layer.task.spec.kind == "classification":
            draw_confusion(axes, confusion(found, episode))
        else:
            draw_values(axes, found, episode)
        drawing.tidy(axes, "true", "predicted")

    return drawing.before_and_after(meta_layer, episode, draw)


def draw_values(axes: Axes, predicted: Tensor, episode: Episode) -> None:
    """Points of each task's queries; `predicted` is `[tasks, n, out_features]`."""
    for y, found, counts in zip(episode.query.y.cpu(), predicted.cpu(), episode.query.mask.cpu() > 0, strict=True):
        axes.scatter(y[counts, 0], found[counts, 0], s=14, alpha=0.7)
    low, high = (float(bound) for bound in torch.aminmax(episode.query.y[episode.query.mask > 0][:, 0]))
    axes.plot([low, high], [low, high], "--", color=drawing.GREY, linewidth=1)
