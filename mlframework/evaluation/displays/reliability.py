"""Reliability diagrams: confidence against accuracy, or the nominal probability of intervals against their coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlframework.evaluation.calibration import (
    LEVELS,
    Answers,
    binned,
    calibration_error,
    coverage,
    interval_error,
    nll,
    predicted_queries,
)
from mlframework.evaluation.displays.drawing import BLUE, GREY, LIGHT, new_figure, tidy
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.evaluation.predictors.predictor import with_variance
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet
from mlframework.inner_loop.inner_update import at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Reliability", "draw_reliability"]


class Reliability(Display):
    """Draws the reliability diagram of validation tasks; see `draw_reliability`.

    A regression's algorithm without a variance gets a constant one, fitted on as many other validation tasks.

    Args:
        tasks: how many.
        bins: of confidence, of equal width.
    """

    def __init__(self, *, tasks: int = 100, bins: int = 15) -> None:
        self.tasks, self.bins = at_least("tasks", tasks, 1), at_least("bins", bins, 1)

    def show(self, validated: Validated, log: Log) -> None:
        layer = validated.meta_layer
        steps = layer.test_inner_steps
        tasks, others = (
            TaskSet(layer.task, "validation", tasks=self.tasks, seed=seed) for seed in (VALIDATION_SEED, 2)
        )
        answers = predicted_queries(with_variance(layer, others, steps), tasks, steps)
        figure = new_figure(4.2, 4.2)
        draw_reliability(figure.add_subplot(), answers, self.bins)
        log.figure("validation/reliability", figure, validated.step)
        name, error = calibration_figure(answers, self.bins)
        log.scalars({f"validation/{name}": error, "validation/nll": float(nll(answers).mean())}, validated.step)


def calibration_figure(answers: Answers, bins: int) -> tuple[str, float]:
    """The name and the value of the calibration error of a kind of task."""
    if answers.kind == "regression":
        return "interval_error", float(interval_error(answers).mean())
    return "ece", float(calibration_error(answers, bins).mean())


def draw_reliability(axes: Axes, answers: Answers, bins: int) -> None:
    """Bars of accuracy by confidence, with the share of queries in each bin; or the coverage of central intervals.

    The diagonal is perfect calibration. Bars below it are overconfident, and so is coverage below it.
    """
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2)
    name, error = calibration_figure(answers, bins)
    if answers.kind == "regression":
        axes.plot(LEVELS.tolist(), coverage(answers).mean(0).tolist(), "-o", color=BLUE, markersize=3.5)
        tidy(axes, "nominal probability of the interval", "coverage")
    else:
        draw_bins(axes, answers, bins)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(f"{name.replace('_', ' ')} {error:.3f}", fontsize=10)


def draw_bins(axes: Axes, answers: Answers, bins: int) -> None:
    """Accuracy in each bin of confidence, and the share of queries in it."""
    found, width = binned(answers, bins), 1 / bins
    left, share = (found.edges - width).tolist(), (found.queries / found.queries.sum()).tolist()
    axes.bar(left, share, width, align="edge", color=LIGHT, alpha=0.6, label="share of queries")
    heights = found.accuracy.tolist()  # 0 in an empty bin
    axes.bar(left, heights, width, align="edge", fill=False, edgecolor=BLUE, linewidth=1.4, label="accuracy")
    tidy(axes, "confidence", "accuracy")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
