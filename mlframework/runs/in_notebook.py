"""Meta-training and evaluation of objects at hand: no config, no run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.evaluation import Evaluation
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import Report
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.screen import showing, stage
from mlframework.tasks.on_features import on_features
from mlframework.training.outer_loop import OuterLoop

__all__ = ["evaluate", "train"]


def train(
    meta_layer: MetaLayer,
    *,
    steps: int,
    meta_batch: int = 25,
    lr: float = 1e-3,
    clip: float | None = 10.0,
    capture: bool = False,
    seed: int = 0,
) -> list[float]:
    """Meta-trains an algorithm in place, by Adam along a cosine schedule, on tasks of the split `train`.

    Args:
        meta_batch: tasks per outer step.
        lr: the outer rate at the start; it falls to 0.
        clip: the largest norm of the meta-gradient; None leaves it as it is.
        capture: whether the step is compiled, which takes up to a minute or two, once.

    Returns:
        The mean query loss of each outer step's tasks.
    """
    check_numbers(meta_layer)
    at_least("steps", steps, 1)
    at_least("meta_batch", meta_batch, 1)
    learned = [p for p in meta_layer.parameters() if p.requires_grad]
    if not learned:
        raise UserError("there is nothing to learn: evaluate(meta_layer) judges the algorithm as it is")
    optimizer = torch.optim.Adam(learned, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    outer = OuterLoop(meta_layer, optimizer, schedule, clip=clip, capture=capture)
    task, device = on_features(meta_layer.task, meta_layer.base_layer), learned[0].device
    outer.prepare(task.sample(2, "train", torch.Generator().manual_seed(seed)).to(device))
    losses, generator = [], torch.Generator().manual_seed(seed)
    with showing(), stage("meta-training", steps) as at:
        for _ in range(steps):
            metrics = outer.step(task.sample(meta_batch, "train", generator).to(device))
            losses.append(metrics["query_loss"])
            at.done += 1
    return torch.stack(losses).tolist()


def evaluate(
    meta_layer: MetaLayer,
    *,
    tasks: int = 100,
    seed: int = 0,
    split: Split = "test",
    validation_tasks: int = 100,
    monitor: str = "query_loss",
    baseline: Mapping[str, Baseline] | None = None,
    make_base_layer: Callable[[], BaseLayer] | None = None,
) -> Report:
    """Judges an algorithm on frozen tasks: the same seed draws the same tasks, with the same hash.

    Args:
        tasks, seed, split: how many tasks are drawn, from which seed, and of which split.
        validation_tasks, monitor: how many tasks of the split `validation` choose the inner steps, by which metric.
        baseline: methods by name that are judged beside the algorithm, such as `{"scikit_learn": ScikitLearn()}`.
        make_base_layer: draws a new network, for a baseline that trains from scratch.

    Returns:
        The report; `report.rows[0].interval("query_loss")` is the algorithm's mean with its 95 % interval.
    """
    check_numbers(meta_layer)
    evaluation = Evaluation(tasks=tasks, seed=seed, split=split, validation_tasks=validation_tasks, baseline=baseline)
    device = next(meta_layer.parameters(), torch.empty(0)).device
    make = make_base_layer or no_base_layer
    with showing(), stage("evaluating"):
        return evaluation.run(type(meta_layer).__name__, meta_layer, make, device, monitor=monitor)


def check_numbers(meta_layer: MetaLayer) -> None:
    """Refuses parameters of another width than the numbers that its tasks draw, which are of torch's default dtype."""
    drawn, kind = torch.get_default_dtype(), meta_layer.task.spec.kind
    others = {p.dtype for p in meta_layer.parameters() if p.is_floating_point()} - {drawn}
    if others and kind != "sequence":  # tokens are whole numbers
        (other, *_) = others
        why = f"tasks draw {drawn}: call torch.set_default_dtype({other}) before anything is built"
        raise InvalidValue("meta_layer", f"parameters of {other}", why)


def no_base_layer() -> BaseLayer:
    raise InvalidValue("make_base_layer", None, "must draw a new network, as in lambda: MLP(task.spec)")
