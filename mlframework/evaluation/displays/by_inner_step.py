"""Query metrics against inner steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mlframework.evaluation.displays.drawing import BLUE, WIDEST, new_figure, tidy
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.part import Display, Log, Validated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ByInnerStep", "by_step_figure"]


class ByInnerStep(Display):
    """Draws each query metric of the validation tasks against the inner steps, with its interval."""

    def show(self, validated: Validated, log: Log) -> None:
        log.figure("validation/by_inner_step", by_step_figure(validated.by_step), validated.step)


def by_step_figure(metrics: Mapping[str, Sequence[Interval]]) -> Figure:
    """Each metric after 0, 1, ... inner steps: the mean over tasks with its 95 % interval."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(min(2.9 * len(metrics), WIDEST), 2.4)
    for i, (name, intervals) in enumerate(metrics.items()):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        steps, tasks = range(len(intervals)), intervals[0].values
        low, high = ([each.mean + sign * each.half_width for each in intervals] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
        mean = [each.mean for each in intervals]
        axes.plot(steps, mean, "-o", color=BLUE, linewidth=2, markersize=4.5, label=f"mean of {tasks} tasks")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes, "inner steps", name.replace("_", " "))
        axes.legend(frameon=False, fontsize=9)
    return figure
