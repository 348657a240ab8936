"""The meta-gradient: the derivative of the mean meta-loss by every meta-parameter, averaged over tasks and clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlframework.backend.step import Gradients, StepSummary
from mlframework.episode import Episode
from mlframework.errors import UserError
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics

__all__ = ["ClippedMean", "MissingGradient", "clipped", "learned_by", "meta_gradient", "report_missing"]


class MissingGradient(UserError):
    """A meta-parameter that the meta-loss does not depend on."""


def meta_gradient(
    meta_layer: MetaLayer,
    episode: Episode,
    *,
    chunk: int | None = None,
    gradients_of: Callable[[Episode], Gradients] | None = None,
    learned: Mapping[str, nn.Parameter] | None = None,
    tasks: int | None = None,
) -> tuple[Tensor, Metrics]:
    """Sets `.grad` of every meta-parameter to the gradient of the meta-loss, averaged over tasks.

    Args:
        chunk: tasks at a time; each chunk's graph is freed before the next is built, so memory is that of one chunk.
        gradients_of: finds the gradients of a chunk's summed losses; by default autograd does.
        learned: the meta-parameters by name; finding them takes a good part of a small step.
        tasks: of the whole meta-batch, over which is averaged; None: the episode is all of it.

    Returns:
        The meta-loss of each task `[tasks]` and the metrics, detached. Without meta-parameters that is all.

    Raises:
        MissingGradient: a meta-parameter took no part: it would never be learned, in silence.
    """
    learned = learned_by(meta_layer) if learned is None else learned
    for p in learned.values():
        p.grad = None
    parts, tasks = [], tasks or episode.num_tasks
    for part in episode.chunks(chunk or episode.num_tasks):
        if gradients_of is None or not learned:
            losses, metrics = meta_layer.training_loss(part)
            if learned:
                losses.backward(torch.full_like(losses, 1 / tasks))
        else:
            losses, metrics, by_name, _ = averaged(gradients_of(part), tasks)
            for name, grad in by_name.items():
                p = learned[name]
                p.grad = grad if p.grad is None else p.grad + grad
        parts.append({name: value.detach() for name, value in {**metrics, "meta_loss": losses}.items()})
    report_missing(meta_layer, [name for name, p in learned.items() if p.grad is None])
    joined = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return joined.pop("meta_loss"), joined


def averaged(found: Gradients, num_tasks: int) -> Gradients:
    """Gradients of the mean over tasks, of those of the sum."""
    return found._replace(by_name={name: grad / num_tasks for name, grad in found.by_name.items()})


def clipped(found: Gradients, clip: float | None) -> Gradients:
    """Mean gradients over a whole meta-batch, clipped as by `torch.nn.utils.clip_grad_norm_`, with their summary."""
    by_name = found.by_name
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in by_name.values()]))
    if clip is not None:
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        by_name = {name: grad * factor for name, grad in by_name.items()}
    means = {name: value.mean() for name, value in found.metrics.items()}
    summary = StepSummary(norm, found.losses.sum() + norm, means)
    return found._replace(by_name=by_name, summary=summary)


@dataclass(frozen=True)
class ClippedMean:
    """The mean meta-gradient over a whole meta-batch, clipped: the end of a step that is compiled as a whole."""

    clip: float | None

    def __call__(self, found: Gradients) -> Gradients:
        return clipped(averaged(found, len(found.losses)), self.clip)


def learned_by(meta_layer: MetaLayer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in meta_layer.named_parameters() if p.requires_grad}


def report_missing(meta_layer: MetaLayer, names: Sequence[str]) -> None:
    if names:
        raise MissingGradient(f"no gradient reaches {', '.join(names)}: {'; '.join(advice(meta_layer, names))}")


def advice(meta_layer: MetaLayer, names: Sequence[str]) -> Iterator[str]:
    """How to get rid of parameters that take no part: an algorithm freezes parameters of the base layer alone."""
    inside = [name.removeprefix("base_layer.") for name in names if name.startswith("base_layer.")]
    if inside:
        yield f"freeze unused parameters: algorithm.frozen='{'|'.join(f'^{name}$' for name in inside)}'"
    owners = {name.partition(".")[0] for name in names if not name.startswith("base_layer.")}
    for owner in sorted(owners):
        kind = type(getattr(meta_layer, owner)).__name__
        yield (
            f"{owner} ({kind}) takes no part, and algorithm.frozen names parameters of the base layer alone: "
            f"choose another {owner}, or leave it out"
        )
