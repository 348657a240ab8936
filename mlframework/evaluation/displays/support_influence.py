"""How much each support example moves the predictions of its task."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.evaluation.displays import drawing
from mlframework.evaluation.displays.contact_sheet import draw_image
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.inner_loop.inner_loop import last
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SupportInfluence", "influence_figure", "support_influence", "without_each"]

log = logging.getLogger(__name__)


class SupportInfluence(Display):
    """Draws the influence of each support example of the first validation task; see `support_influence`.

    Args:
        examples: the most that are left out, each of which takes an adaptation; the first ones of the support set.
    """

    def __init__(self, *, examples: int = 50) -> None:
        self.examples = at_least("examples", examples, 1)

    def show(self, validated: Validated, log: Log) -> None:
        layer, first = validated.meta_layer, validated.episode.tasks(slice(1))
        moved = support_influence(layer, first, self.examples)
        if not len(moved):
            return
        of_each = moved.mean(1)
        log.figure("validation/support_influence", influence_figure(moved, first), validated.step)
        ends = {"largest": float(of_each.max()), "mean": float(of_each.mean())}
        log.scalars({f"validation/support_influence/{name}": value for name, value in ends.items()}, validated.step)


def support_influence(meta_layer: MetaLayer, episode: Episode, most: int = 50) -> Tensor:
    """By how much a query's prediction moves if a support example is left out: `[support, queries]` on the CPU.

    The task adapts anew without each example, so the numbers are exact. For a classification and a sequence it is the
    total variation distance of the two predicted distributions, from 0 to 1, for a regression the Euclidean distance
    of the two predictions. Queries and support examples that a mask leaves out are left out.

    Args:
        episode: a single task.
        most: the first so many examples are left out in turn; 0 rows where the support set has a single example.

    Reference: Cook, Detection of Influential Observation in Linear Regression, 1977, Technometrics 19(1), equation 5
        (deletion of one observation, and the change of all fitted values). Influence functions approximate it: Koh,
        Liang, Understanding Black-box Predictions via Influence Functions, 2017, arXiv:1703.04730, section 2.1.
        Deviation: Cook's distance divides by the variance of the residuals.
    """
    meta_layer.eval()
    rows = counted(episode.support.mask)
    left_out = without_each(episode.support, rows, min(most, len(rows)) if len(rows) > 1 else 0)
    if left_out is None:
        return torch.zeros(0, 0)
    count = len(left_out.mask)
    with torch.no_grad():
        every = Episode(left_out, Examples(*(leaf.expand(count, *leaf.shape[1:]) for leaf in episode.query)))
        adapted = last(meta_layer.trajectory(every.support, meta_layer.test_inner_steps))
        found = meta_layer.predict_query(adapted, every, meta_layer.batch_norm)
        whole = last(meta_layer.trajectory(episode.support, meta_layer.test_inner_steps))
        before = meta_layer.predict_query(whole, episode, meta_layer.batch_norm)
    if meta_layer.task.spec.kind == "regression":
        moved = torch.linalg.vector_norm(found - before, dim=-1)
    else:
        moved = (found.softmax(-1) - before.softmax(-1)).abs().sum(-1) / 2
    mask = (episode.query.mask > 0).to(moved).expand_as(moved)
    of_query = (moved * mask).flatten(2).sum(2) / mask.flatten(2).sum(2).clamp(min=1) if moved.dim() > 2 else moved
    return of_query[:, counted(episode.query.mask)].cpu()


def counted(mask: Tensor) -> Tensor:
    """The rows of a single task that count, at least in one position."""
    return torch.nonzero((mask[0] > 0).flatten(1).any(1) if mask.dim() > 2 else mask[0] > 0).flatten()


def without_each(support: Examples, rows: Tensor, count: int) -> Examples | None:
    """A task for each of the first `count` of `rows`: the support set of those rows without that one."""
    if not count:
        return None
    others = torch.stack([torch.cat([rows[:i], rows[i + 1 :]]) for i in range(count)])  # [count, n - 1]
    return Examples(*(leaf[0][others] for leaf in support))


def influence_figure(moved: Tensor, episode: Episode) -> Figure:
    """A bar for each support example, its mean over queries, and a table of support examples and queries.

    Examples and queries of a classification stand in the order of their classes; images stand before their bars.
    """
    classes = episode.support.y.dim() == 2 and not episode.support.y.is_floating_point()
    rows = counted(episode.support.mask)[: len(moved)].cpu()
    columns = counted(episode.query.mask).cpu()
    labels = [f"{int(episode.support.y[0, row])}" if classes else str(int(row)) for row in rows]
    if classes:
        order = torch.argsort(episode.support.y[0].cpu()[rows], stable=True)
        moved, rows, labels = moved[order], rows[order], [labels[i] for i in order.tolist()]
        moved = moved[:, torch.argsort(episode.query.y[0].cpu()[columns], stable=True)]
    figure = drawing.new_figure(5.6, 0.8 + max(1.6, 0.17 * len(rows)))
    bars, table = figure.subplots(1, 2, width_ratios=(1, 1.3))
    bars.barh(range(len(rows)), moved.mean(1).tolist(), color=drawing.BLUE)
    bars.set_ylim(len(rows) - 0.5, -0.5)
    bars.set_yticks(range(len(rows)), labels if len(rows) <= 25 else [""] * len(rows), fontsize=9)
    drawing.tidy(bars, "mean change", "support example" + (" (class)" if classes else ""))
    table.imshow(moved.numpy(), cmap="Blues", vmin=0, aspect="auto")
    table.set(xlabel="queries", yticks=[])
    figure.suptitle("change of predictions without each example", fontsize=10)
    if is_image(episode.support.x) and len(rows) <= 10:
        strip = bars.inset_axes((-0.42, 0, 0.16, 1))
        strip.set(xlim=(0, 0.8), ylim=(len(rows), 0))
        strip.set_axis_off()
        for place, row in enumerate(rows.tolist()):
            draw_image(strip, episode.support.x[0], row, (0, place), drawing.INK)
        bars.tick_params(axis="y", pad=22)
    return figure


def is_image(x: Tensor) -> bool:
    """Whether inputs `[1, n, channels, height, width]` are images of one or three channels."""
    return x.dim() == 5 and x.shape[2] in (1, 3)
