"""The inner loop by step and layer: support losses, gradient norms, lengths of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, Params
from mlframework.evaluation.displays.drawing import BLUE, GREY, WIDEST, new_figure, tidy
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet
from mlframework.inner_loop.inner_loop import gradients
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.meta_layer import MetaLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["InnerStep", "InnerSteps", "inner_steps", "inner_steps_figure"]

#: The most names of parameters that stand beside a table; of more, every second or third one does.
MOST_NAMES = 10


class InnerStep(NamedTuple):
    """One step of the inner loop, for each task."""

    losses: Tensor  # of the support set before the step [tasks]
    grad_norms: Params  # of each adapted parameter's gradient, before clipping and decay [tasks]
    lengths: Params  # of the step that the update rule takes along each [tasks]; empty after the last one


class InnerSteps(Display):
    """Writes the support loss, the gradient norms and the step lengths by inner step and parameter, over tasks.

    An algorithm without an inner loop has none. A step's length over its gradient's norm is the rate by which a layer
    moves, whatever the update rule.

    Args:
        tasks: validation tasks.
    """

    def __init__(self, *, tasks: int = 25) -> None:
        self.tasks = at_least("tasks", tasks, 1)

    def show(self, validated: Validated, log: Log) -> None:
        layer = validated.meta_layer
        if not isinstance(layer, MAML):
            return
        episode = Episode.stack(list(TaskSet(layer.task, "validation", tasks=self.tasks, seed=VALIDATION_SEED)))
        steps = inner_steps(layer, episode.support.to(validated.episode.device), layer.test_inner_steps)
        histograms: dict[str, Tensor] = {}
        for number, step in enumerate(steps):
            histograms[f"inner_loop/support_loss/step_{number}"] = step.losses
            for name, norms in step.grad_norms.items():
                histograms[f"inner_loop/grad_norm/{name}/step_{number}"] = norms
        log.histograms(histograms, validated.step)
        losses = {f"inner_loop/support_loss_by_step/{n}": float(step.losses.mean()) for n, step in enumerate(steps)}
        log.scalars(losses, validated.step)
        log.figure("inner_loop/by_step_and_layer", inner_steps_figure(steps), validated.step)


def inner_steps(meta_layer: MetaLayer, support: Examples, steps: int) -> list[InnerStep]:
    """The inner steps of `steps`, and the state after the last one, whose lengths are empty."""
    assert isinstance(meta_layer, MAML)
    meta_layer.eval()
    with torch.no_grad():
        path = list(meta_layer.trajectory(support, steps))
    found = []
    for number, params in enumerate(path):
        own = {name: params[name].detach().requires_grad_() for name in meta_layer.adapted_names}
        with torch.enable_grad():
            losses = meta_layer.inner_losses({**params, **own}, min(number, steps - 1), support)
            grads = gradients(losses, own, create_graph=False)
        after = path[number + 1] if number < steps else {}
        lengths = {name: norm(after[name] - params[name]) for name in grads if after}
        found.append(InnerStep(losses.detach(), {name: norm(grad) for name, grad in grads.items()}, lengths))
    return found


def norm(stacked: Tensor) -> Tensor:
    """The norm of each task's part of a stacked tensor, `[tasks]`."""
    return torch.linalg.vector_norm(stacked.detach().flatten(1), dim=1)


def inner_steps_figure(steps: list[InnerStep]) -> Figure:
    """The support loss of each task by step; gradient norms and rates by layer and step, medians over tasks."""
    from matplotlib.ticker import MaxNLocator

    names = list(steps[0].grad_norms)
    figure = new_figure(WIDEST, 2.6)
    axes, of_norms, of_rates = figure.subplots(1, 3)
    losses = torch.stack([step.losses for step in steps]).cpu()  # [steps + 1, tasks]
    axes.plot(losses.numpy(), color=GREY, alpha=0.35, linewidth=0.8)
    axes.plot(losses.mean(1).numpy(), "-o", color=BLUE, linewidth=2.2, markersize=4.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes, "inner steps", "support loss")
    grad_norms = [[float(step.grad_norms[name].median()) for step in steps] for name in names]
    rates = [[float((s.lengths[n] / s.grad_norms[n].clamp(min=1e-12)).median()) for s in steps[:-1]] for n in names]
    draw_table(of_norms, grad_norms, names, "gradient norm")
    draw_table(of_rates, rates, [""] * len(names), "length / gradient norm")
    return figure


def draw_table(axes: Axes, values: list[list[float]], names: list[str], title: str) -> None:
    """Numbers by layer and step on a colour scale of their logarithms."""
    table = torch.tensor(values)
    axes.imshow(table.clamp(min=1e-12).log().numpy(), cmap="Blues", aspect="auto", alpha=0.6)
    axes.set_title(title, fontsize=10)
    shown = range(0, len(names), -(-len(names) // MOST_NAMES))
    axes.set_yticks(shown, [shortened(names[row]) for row in shown], fontsize=9)
    axes.set_xticks(range(table.shape[1]), [str(step + 1) for step in range(table.shape[1])], fontsize=9)
    axes.set_xlabel("inner step")


def shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
