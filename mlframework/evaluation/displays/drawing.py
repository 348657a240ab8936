"""Shared by figures: colours, axes, and the models before and after adaptation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlframework.episode import Episode
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["after_steps", "before_and_after", "new_figure", "predictions", "some_models", "tidy"]

#: TensorBoard shows a figure as a thumbnail of about 475 x 215 pixels. Letters can be read there if a figure is no
#: wider than this, and about 2.5 inches high.
WIDEST = 7.2

INK, GREY, LIGHT, BLUE = "#222222", "#8a8f98", "#86b6e8", "#1558a8"
GREEN, RED = "#1f9447", "#d03027"
#: Of the outputs after the first.
OTHERS = ("#c2570c", "#7a3fb0", "#1f9447")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of some inches; one wider than `WIDEST` is no longer legible as a thumbnail."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def tidy(axes: Axes, x: str, y: str) -> None:
    """Labels, a faint grid, and no frame at the top and the right."""
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def after_steps(step: int, last: int) -> str:
    """The legend of the prediction after `step` of `last` inner steps."""
    if last == 0:
        return "prediction"
    return "before adaptation" if step == 0 else f"after {step} inner step{'s' * (step > 1)}"


def some_models(meta_layer: MetaLayer, episode: Episode) -> dict[int, Adapted]:
    """The tasks' models after 0, 1 and all inner steps; a single one from an algorithm without inner steps."""
    meta_layer.eval()
    steps = meta_layer.test_inner_steps
    with torch.no_grad():
        path = enumerate(meta_layer.trajectory(episode.support, steps))
        return {step: model for step, model in path if step in (0, 1, steps)}


def predictions(meta_layer: MetaLayer, adapted: Adapted, episode: Episode) -> Tensor:
    """The predictions of adapted models for the query set: `[tasks, n, out_features]`."""
    with torch.no_grad():
        return meta_layer.predict_query(adapted, episode, meta_layer.batch_norm)


def before_and_after(meta_layer: MetaLayer, episode: Episode, draw: Callable[[Axes, Tensor], None]) -> Figure:
    """Axes before and after adaptation; `draw` gets the predictions for the query set: `[tasks, n, out_features]`."""
    models = some_models(meta_layer, episode)
    last = max(models)
    shown = dict.fromkeys((0, last))
    figure = new_figure(2.6 * len(shown), 2.6)
    for number, step in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        axes.set_title(after_steps(step, last), fontsize=10)
        draw(axes, predictions(meta_layer, models[step], episode))
    return figure
