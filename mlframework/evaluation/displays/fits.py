"""Functions of one number with the predicted curve before and after adaptation."""

from __future__ import annotations

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

__all__ = ["Fits", "fits"]

#: Points of a drawn curve.
POINTS = 200


class Fits(Display):
    """Draws the first validation tasks of a regression with one input; see `fits`."""

    def check(self, task: TaskDistribution) -> None:
        if (task.spec.kind, task.spec.x_shape) != ("regression", (1,)):
            raise UserError(f"draws functions of one number, and {type(task).__name__} is none")

    def show(self, validated: Validated, log: Log) -> None:
        log.figure("validation/tasks", fits(validated.meta_layer, validated.episode), validated.step)


def fits(meta_layer: MetaLayer, episode: Episode) -> Figure:
    """A pair of axes for each task: support, query, and the curve before, after one and after all inner steps.

    Further outputs have colours of their own, their points too, and a curve after all inner steps alone.
    """
    on_grid = episode._replace(query=grid_over(episode))
    models = drawing.some_models(meta_layer, episode)
    last = max(models)
    curves = {step: drawing.predictions(meta_layer, model, on_grid) for step, model in models.items()}
    with torch.no_grad():
        losses = [meta_layer.query_metrics(models[step], episode)["query_loss"] for step in (0, last)]  # [tasks] each
    columns = episode.num_tasks
    figure = drawing.new_figure(min(2.6 * columns, drawing.WIDEST), 2.5)
    for i in range(episode.num_tasks):
        axes = figure.add_subplot(1, columns, i + 1)
        for step, y in curves.items():
            draw_curve(axes, on_grid.query.x[i, :, 0], y[i, :, 0], step, last)
        for output in range(1, curves[last].shape[-1]):
            colour = drawing.OTHERS[(output - 1) % len(drawing.OTHERS)]
            axes.plot(on_grid.query.x[i, :, 0].cpu(), curves[last][i, :, output].cpu(), color=colour, linewidth=2.2)
            draw_points(axes, episode.tasks(slice(i, i + 1)), output, colour)
        draw_points(axes, episode.tasks(slice(i, i + 1)))
        before, after = (float(loss[i]) for loss in losses)
        axes.set_title(f"query loss\n{before:.3g} → {after:.3g}" if last else f"query loss\n{after:.3g}", fontsize=10)
        drawing.tidy(axes, "x", "" if i else "y")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def grid_over(episode: Episode) -> Examples:
    """Points over the range of all inputs, the same for each task: `[tasks, POINTS, 1]`."""
    x = episode.joined().x
    line = torch.linspace(float(x.min()), float(x.max()), POINTS, device=x.device, dtype=x.dtype)
    grid = line.expand(episode.num_tasks, POINTS)
    return Examples(grid[..., None], torch.zeros_like(grid[..., None]), torch.ones_like(grid))


def draw_curve(axes: Axes, x: Tensor, y: Tensor, step: int, last: int) -> None:
    """The prediction after `step` of `last` inner steps; `x` and `y` are `[POINTS]`."""
    styles = {0: (drawing.GREY, "--", 1.6), last: (drawing.BLUE, "-", 2.2)}
    colour, dashes, width = styles.get(step, (drawing.LIGHT, "-", 1.6))
    axes.plot(x.cpu(), y.cpu(), dashes, color=colour, linewidth=width, label=drawing.after_steps(step, last))


def draw_points(axes: Axes, task: Episode, output: int = 0, colour: str = drawing.INK) -> None:
    """The support and query points of one task at an output; the legend names those of the first."""
    for name, fill, examples in (("support", colour, task.support), ("query", "white", task.query)):
        counts = examples.mask[0].cpu() > 0
        x, y = examples.x[0, :, 0].cpu()[counts], examples.y[0, :, output].cpu()[counts]
        label = None if output else name
        axes.scatter(x, y, s=24, zorder=3, facecolors=fill, edgecolors=colour, label=label)
