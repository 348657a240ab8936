"""A task of images: its support set, its query set, and the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import UserError
from mlframework.evaluation.displays import drawing
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ContactSheet", "contact_sheet"]

#: The most classes of a contact sheet, and the most images of each class in the support set and in the query set.
MOST_CLASSES, MOST_SHOTS, MOST_QUERIES = 10, 3, 5


class ContactSheet(Display):
    """Draws the first validation task of a classification of images; see `contact_sheet`."""

    def check(self, task: TaskDistribution) -> None:
        kind, x_shape = task.spec.kind, task.spec.x_shape
        if kind != "classification" or len(x_shape) != 3 or x_shape[0] not in (1, 3):
            why = f"{type(task).__name__} is a {kind} of inputs {tuple(x_shape)}"
            raise UserError(f"draws classes of images with one or three channels, and {why}")

    def show(self, validated: Validated, log: Log) -> None:
        first = validated.episode.tasks(slice(1))
        log.figure("validation/tasks", contact_sheet(validated.meta_layer, first), validated.step)


def contact_sheet(meta_layer: MetaLayer, episode: Episode) -> Figure:
    """One row per class: its support images, then its query images in green where the prediction is right, else in red.

    Under each query stands the predicted class and its probability. The episode is a single task, of images with one
    or three channels.
    """
    models = drawing.some_models(meta_layer, episode)
    last = max(models)
    before, after = (drawing.predictions(meta_layer, models[step], episode)[0] for step in (0, last))  # [n, classes]
    support, query = (images_by_class(examples, meta_layer.task.spec.out_features) for examples in episode)
    k_shot, k_query = (max(len(images) for images in part) for part in (support, query))
    shots = (min(MOST_SHOTS, k_shot), min(MOST_QUERIES, k_query))
    rows = min(MOST_CLASSES, len(support))
    figure = drawing.new_figure(0.55 * sum(shots) + 0.8, 0.5 * rows + 0.7)
    left, right = figure.subplots(1, 2, width_ratios=shots)
    draw_support(left, episode.support, support[:rows], shots[0])
    draw_queries(right, episode.query, query[:rows], shots[1], after.softmax(-1))
    title = f"{len(support)}-way {k_shot}-shot: query accuracy {accuracy(after, episode.query):.2f}"
    if last:
        title += f"\n{drawing.after_steps(last, last)}, {accuracy(before, episode.query):.2f} before"
    figure.suptitle(title, fontsize=10)
    return figure


def images_by_class(examples: Examples, classes: int) -> list[list[int]]:
    """The rows of each class that count, of a single task."""
    y, mask = examples.y[0].cpu(), examples.mask[0].cpu()
    return [torch.nonzero((y == label) & (mask > 0)).flatten().tolist() for label in range(classes)]


def accuracy(logits: Tensor, query: Examples) -> float:
    """The share of right predictions among the queries of a single task that count; `logits` `[n, classes]`."""
    counts = query.mask[0] > 0
    return float((logits.argmax(-1) == query.y[0])[counts].float().mean())


def draw_support(axes: Axes, examples: Examples, rows: Sequence[Sequence[int]], columns: int) -> None:
    prepare_sheet(axes, "class, support", len(rows), columns)
    for label, images in enumerate(rows):
        axes.text(-0.2, label + 0.5, str(label), ha="right", va="center", fontsize=9)
        for column, image in enumerate(images[:columns]):
            draw_image(axes, examples.x[0], image, (column, label), drawing.INK)


def draw_queries(
    axes: Axes, examples: Examples, rows: Sequence[Sequence[int]], columns: int, probabilities: Tensor
) -> None:
    """Query images with their predictions; `probabilities` `[n, classes]`."""
    prepare_sheet(axes, "query: prediction", len(rows), columns)
    for label, images in enumerate(rows):
        for column, image in enumerate(images[:columns]):
            predicted = int(probabilities[image].argmax())
            colour = drawing.GREEN if predicted == label else drawing.RED
            draw_image(axes, examples.x[0], image, (column, label), colour)
            text = f"{predicted}  {float(probabilities[image, predicted]):.0%}"
            axes.text(column + 0.4, label + 0.9, text, color=colour, ha="center", va="center", fontsize=9)


def prepare_sheet(axes: Axes, title: str, rows: int, columns: int) -> None:
    """Axes without lines in which an image takes 0.8 by 0.8, from the top left corner of its cell."""
    axes.set_title(title, fontsize=9, color=drawing.GREY, loc="left")
    axes.set(xlim=(-0.1, columns), ylim=(rows, -0.1), aspect="equal", autoscale_on=False)
    axes.set_axis_off()


def draw_image(axes: Axes, x: Tensor, row: int, cell: tuple[int, int], frame: str) -> None:
    """One image of `x` `[n, channels, height, width]` in a frame; all share one scale of brightness."""
    from matplotlib.patches import Rectangle

    low, high = float(x.min()), float(x.max())
    pixels = ((x[row] - low) / max(high - low, 1e-12)).movedim(0, -1).squeeze(-1).cpu().numpy()
    left, top = cell
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(left, left + 0.8, top + 0.8, top), aspect="auto")
    width = 1 if frame == drawing.INK else 2.5
    axes.add_patch(Rectangle((left, top), 0.8, 0.8, fill=False, edgecolor=frame, linewidth=width))
