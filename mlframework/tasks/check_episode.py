"""Checks an episode against the spec of its task."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import UserError

__all__ = ["check_episode", "faults"]


def check_episode(episode: Episode, spec: TaskSpec, *, num_tasks: int, where: str) -> None:
    """Refuses an episode that does not follow the spec, or has another number of tasks, in one line from `where` on."""
    is_whole = isinstance(episode, Episode) and all(isinstance(part, Examples) for part in episode)
    if not is_whole or not all(isinstance(leaf, Tensor) for part in episode for leaf in part):
        raise UserError(f"{where}: sample must return an Episode of Examples, whose x, y and mask are tensors")
    for name, examples in episode._asdict().items():
        for leaf, value in examples._asdict().items():
            if value.dim() < 2 or len(value) != num_tasks:
                what = f"{name}.{leaf} is {tuple(value.shape)}, and must start with the {num_tasks} tasks asked for"
                raise UserError(f"{where}: {what}")
        for fault in faults(examples, spec):
            raise UserError(f"{where} {name}: {fault}")


def faults(examples: Examples, spec: TaskSpec) -> Iterator[str]:
    """The faults of one half of an episode; later ones may follow from the first."""
    x, y, mask = (tuple(leaf.shape) for leaf in examples)
    if x[2:] != tuple(spec.x_shape):
        yield f"x is {x}, spec.x_shape is {spec.x_shape}"
    if y[:2] != x[:2]:
        yield f"y is {y} beside an x of {x}"
    rest = (spec.out_features,) if spec.kind == "regression" else ()
    if spec.kind == "sequence" and len(y) < 3:
        yield f"y is {y}, and a sequence has a class per position"
    if spec.kind != "sequence" and y[2:] != rest:
        yield f"y is {y}, and must be {(*x[:2], *rest)} in a {spec.kind}"
    positions = y[:-1] if spec.kind == "regression" else y
    if mask != positions:
        yield f"the mask is {mask}, and must be {positions}"
    yield from faults_of_value(examples, spec)


def faults_of_value(examples: Examples, spec: TaskSpec) -> Iterator[str]:
    x, y, mask = examples
    number = torch.get_default_dtype()
    target = number if spec.kind == "regression" else torch.int64
    if not all(leaf.device.type == "cpu" for leaf in examples):
        yield "episodes are drawn on the CPU"
    if x.dtype not in (number, torch.int64):
        yield f"x is {x.dtype}, and must be {number} or torch.int64"
    if y.dtype != target:
        yield f"y is {y.dtype}, and must be {target} in a {spec.kind}"
    if not torch.isfinite(x).all():
        yield "x is not finite"
    if not ((mask == 0) | (mask == 1)).all():
        yield "the mask holds something other than 0 and 1"
    if not mask.flatten(1).any(1).all():
        yield "nothing counts in one of the tasks"
    if not (spec.ragged or mask.all()):
        yield "spec.ragged is False, and the mask holds zeros"
    ids = y[mask.bool()]
    if spec.kind != "regression" and not ((ids >= 0) & (ids < spec.out_features)).all():
        yield f"class ids are not all in 0...{spec.out_features - 1}: y holds {int(ids.min())}...{int(ids.max())}"
