"""Pictures of adaptation: fits of functions, contact sheets of images, metrics against inner steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.evaluation.task_set import Interval
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer

__all__ = ["by_step_figure", "contact_sheet", "episode_figure", "fits"]

#: Points of a drawn curve.
GRID = 200
#: What a contact sheet shows at most: classes, and images of each class in the support set and in the query set.
MOST_CLASSES, MOST_SHOTS, MOST_QUERIES = 10, 5, 8

INK, GREY, LIGHT, BLUE = "#222222", "#8a8f98", "#86b6e8", "#1558a8"
GREEN, RED = "#1f9447", "#d03027"


def episode_figure(meta_layer: MetaLayer, episode: Episode) -> Figure | None:
    """A picture of how tasks are adapted to, or None for tasks of a kind that no picture here is made for.

    Functions of one number are drawn as `fits` of all tasks of the episode, classes of images as the `contact_sheet` of
    its first task.
    """
    kind, x_shape, out_features, _ = meta_layer.task.spec
    if kind == "regression" and (x_shape, out_features) == ((1,), 1):
        return fits(meta_layer, episode)
    if kind == "classification" and len(x_shape) == 3 and x_shape[0] in (1, 3):
        return contact_sheet(meta_layer, episode.tasks(slice(1)))
    return None


def fits(meta_layer: MetaLayer, episode: Episode) -> Figure:
    """Functions of one number: support, query, and the predicted curve before, after one and after all inner steps.

    Args:
        meta_layer: an algorithm on a regression task of one input and one output.
        episode: one pair of axes is drawn for each of its tasks.
    """
    grid = grid_over(episode)
    models = trajectory(meta_layer, episode)
    last = max(models)
    curves = {step: predictions(meta_layer, model, episode._replace(query=grid)) for step, model in models.items()}
    with torch.no_grad():
        losses = [meta_layer.query_metrics(models[step], episode)["query_loss"] for step in (0, last)]  # [tasks] each
    columns = min(2, episode.num_tasks)
    rows = -(-episode.num_tasks // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.6), dpi=110, layout="constrained")
    for i in range(episode.num_tasks):
        axes = figure.add_subplot(rows, columns, i + 1)
        for step, y in curves.items():
            draw_curve(axes, grid.x[i, :, 0], y[i, :, 0], step, last)
        draw_points(axes, episode.tasks(slice(i, i + 1)))
        before, after = (float(loss[i]) for loss in losses)
        axes.set_title(f"query loss {before:.3g} → {after:.3g}" if last else f"query loss {after:.3g}", fontsize=10)
        tidy(axes, "x", "y")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def grid_over(episode: Episode) -> Examples:
    """Points over the range of all inputs, the same for each task: `[tasks, GRID, 1]`."""
    x = episode.joined().x
    line = torch.linspace(float(x.min()), float(x.max()), GRID, device=x.device, dtype=x.dtype)
    grid = line.expand(episode.num_tasks, GRID)
    return Examples(grid[..., None], torch.zeros_like(grid[..., None]), torch.ones_like(grid))


def draw_curve(axes: Axes, x: Tensor, y: Tensor, step: int, last: int) -> None:
    """The prediction after `step` of `last` inner steps; `x` and `y` are `[GRID]`."""
    if step == last:
        colour, dashes, width = BLUE, "-", 2.2
    else:
        colour, dashes, width = (GREY, "--", 1.6) if step == 0 else (LIGHT, "-", 1.6)
    axes.plot(x.cpu(), y.cpu(), dashes, color=colour, linewidth=width, label=after_steps(step, last))


def draw_points(axes: Axes, task: Episode) -> None:
    """The support and query points of one task."""
    for name, fill, examples in (("support", INK, task.support), ("query", "white", task.query)):
        counts = examples.mask[0].cpu() > 0
        x, y = (leaf[0, :, 0].cpu()[counts] for leaf in (examples.x, examples.y))
        axes.scatter(x, y, s=24, zorder=3, facecolors=fill, edgecolors=INK, label=name)


def after_steps(step: int, last: int) -> str:
    """What the legend calls the prediction after `step` of `last` inner steps."""
    if last == 0:
        return "prediction"
    return "before adaptation" if step == 0 else f"after {step} inner step{'s' * (step > 1)}"


def contact_sheet(meta_layer: MetaLayer, episode: Episode) -> Figure:
    """One row per class: its support images, then its query images in green where the prediction is right, else in red.

    Under each query stands the predicted class and its probability.

    Args:
        meta_layer: an algorithm on a classification task of images with one or three channels.
        episode: a single task.
    """
    models = trajectory(meta_layer, episode)
    last = max(models)
    before, after = (predictions(meta_layer, models[step], episode)[0] for step in (0, last))  # [n, classes]
    support, query = (images_by_class(examples, meta_layer.task.spec.out_features) for examples in episode)
    shots = (min(MOST_SHOTS, longest(support)), min(MOST_QUERIES, longest(query)))
    rows = min(MOST_CLASSES, len(support))
    figure = Figure(figsize=(0.85 * sum(shots) + 1.5, 1.0 * rows + 1.0), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=shots)
    draw_support(left, episode.support, support[:rows], shots[0])
    draw_queries(right, episode.query, query[:rows], shots[1], after.softmax(-1))
    title = f"{len(support)}-way {longest(support)}-shot: query accuracy {accuracy(after, episode.query):.2f}"
    if last:
        title += f" {after_steps(last, last)}, {accuracy(before, episode.query):.2f} before"
    figure.suptitle(title, fontsize=11)
    return figure


def images_by_class(examples: Examples, classes: int) -> list[list[int]]:
    """The rows of each class that count, of a single task."""
    y, mask = examples.y[0].cpu(), examples.mask[0].cpu()
    return [torch.nonzero((y == label) & (mask > 0)).flatten().tolist() for label in range(classes)]


def longest(rows: Sequence[Sequence[int]]) -> int:
    return max(len(row) for row in rows)


def accuracy(logits: Tensor, query: Examples) -> float:
    """The share of right predictions among the queries of a single task that count; `logits` `[n, classes]`."""
    counts = query.mask[0] > 0
    return float((logits.argmax(-1) == query.y[0])[counts].float().mean())


def draw_support(axes: Axes, examples: Examples, rows: Sequence[Sequence[int]], columns: int) -> None:
    prepare_sheet(axes, "support", len(rows), columns)
    for label, images in enumerate(rows):
        axes.text(-0.2, label + 0.5, f"class {label}", ha="right", va="center", fontsize=9)
        for column, image in enumerate(images[:columns]):
            draw_image(axes, examples.x[0], image, (column, label), INK)


def draw_queries(
    axes: Axes, examples: Examples, rows: Sequence[Sequence[int]], columns: int, probabilities: Tensor
) -> None:
    """Query images with what was predicted for them; `probabilities` `[n, classes]`."""
    prepare_sheet(axes, "query: predicted class, its probability", len(rows), columns)
    for label, images in enumerate(rows):
        for column, image in enumerate(images[:columns]):
            predicted = int(probabilities[image].argmax())
            colour = GREEN if predicted == label else RED
            draw_image(axes, examples.x[0], image, (column, label), colour)
            text = f"{predicted}   {float(probabilities[image, predicted]):.0%}"
            axes.text(column + 0.4, label + 0.9, text, color=colour, ha="center", va="center", fontsize=7.5)


def prepare_sheet(axes: Axes, title: str, rows: int, columns: int) -> None:
    """Axes without lines in which an image takes 0.8 by 0.8, from the top left corner of its cell."""
    axes.set_title(title, fontsize=9, color=GREY, loc="left")
    axes.set(xlim=(-0.1, columns), ylim=(rows, -0.1), aspect="equal", autoscale_on=False)
    axes.set_axis_off()


def draw_image(axes: Axes, x: Tensor, row: int, cell: tuple[int, int], frame: str) -> None:
    """One image of `x` `[n, channels, height, width]` in a frame; all share one scale of brightness."""
    low, high = float(x.min()), float(x.max())
    pixels = ((x[row] - low) / max(high - low, 1e-12)).movedim(0, -1).squeeze(-1).cpu().numpy()
    left, top = cell
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(left, left + 0.8, top + 0.8, top), aspect="auto")
    axes.add_patch(Rectangle((left, top), 0.8, 0.8, fill=False, edgecolor=frame, linewidth=1 if frame == INK else 2.5))


def by_step_figure(metrics: Mapping[str, Sequence[Interval]]) -> Figure:
    """Each metric after 0, 1, ... inner steps: the mean over tasks with its 95 % interval."""
    figure = Figure(figsize=(4.6 * len(metrics), 3.4), dpi=110, layout="constrained")
    for i, (name, intervals) in enumerate(metrics.items()):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        steps, tasks = range(len(intervals)), intervals[0].values
        low, high = ([each.mean + sign * each.half_width for each in intervals] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
        mean = [each.mean for each in intervals]
        axes.plot(steps, mean, "-o", color=BLUE, linewidth=2, markersize=4.5, label=f"mean of {tasks} tasks")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes, "inner steps", name.replace("_", " "))
        axes.legend(frameon=False)
    return figure


def tidy(axes: Axes, x: str, y: str) -> None:
    """Labels, a faint grid, and no frame at the top and the right."""
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def trajectory(meta_layer: MetaLayer, episode: Episode) -> dict[int, Adapted]:
    """The tasks' models after 0, 1 and all inner steps; a single one from an algorithm without inner steps."""
    meta_layer.eval()
    steps = meta_layer.test_inner_steps
    with torch.no_grad():
        path = enumerate(meta_layer.trajectory(episode.support, steps))
        return {step: model for step, model in path if step in (0, 1, steps)}


def predictions(meta_layer: MetaLayer, adapted: Adapted, episode: Episode) -> Tensor:
    """What adapted models predict for the query set: `[tasks, n, out_features]`."""
    with torch.no_grad():
        return meta_layer.predict_query(adapted, episode, meta_layer.batch_norm)
