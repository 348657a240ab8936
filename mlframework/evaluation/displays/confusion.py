"""Which classes of a task are taken for which."""

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

__all__ = ["Confusion", "confusion", "confusion_figure", "draw_confusion"]

#: The most classes with a name and a number in each cell.
MOST_CLASSES = 20


class Confusion(Display):
    """Draws the confusion of the first validation task; see `confusion_figure`."""

    kinds = ("classification",)

    def show(self, validated: Validated, log: Log) -> None:
        first = validated.episode.tasks(slice(1))
        log.figure("validation/confusion", confusion_figure(validated.meta_layer, first), validated.step)


def confusion_figure(meta_layer: MetaLayer, episode: Episode) -> Figure:
    """How many queries of each true class have each predicted class, before and after adaptation."""

    def draw(axes: Axes, logits: Tensor) -> None:
        counts = confusion(logits, episode)
        draw_confusion(axes, counts)
        axes.set(xlabel="true class", ylabel="predicted class")
        right = f"{int(counts.trace())} of {int(counts.sum())} right"
        axes.set_title(f"{axes.get_title()}\n{right}", fontsize=10)

    return drawing.before_and_after(meta_layer, episode, draw)


def draw_confusion(axes: Axes, counts: Tensor) -> None:
    """A table whose columns are the true classes, shaded by their share of each prediction."""
    axes.imshow((counts / counts.sum(0).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(counts) > MOST_CLASSES:
        return
    axes.set_xticks(range(len(counts)))
    axes.set_yticks(range(len(counts)))
    for predicted, row in enumerate(counts.tolist()):
        for true, count in enumerate(row):
            dark = count > 0.6 * float(counts[:, true].sum())
            colour = "white" if dark else drawing.INK
            axes.text(true, predicted, str(count), ha="center", va="center", color=colour, fontsize=9)


def confusion(logits: Tensor, episode: Episode) -> Tensor:
    """How many queries of each true class (columns) have each prediction (rows), `[classes, classes]`, on the CPU."""
    kept, classes = episode.query.mask > 0, logits.shape[-1]
    pairs = logits.argmax(-1)[kept] * classes + episode.query.y[kept]
    return torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes)
