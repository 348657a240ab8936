"""Buffers that a base layer writes to in training mode, as spectral norm does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlframework.backend.forward import fork_rng, swap_tensors
from mlframework.backend.step import version_of
from mlframework.episode import Examples
from mlframework.errors import UserError

__all__ = ["follow_parameters", "refresh"]


def follow_parameters(module: nn.Module, one: Examples, other: Examples) -> bool:
    """Whether a forward pass in training mode writes to buffers, which then follow the parameters.

    A `UserError` refuses values that depend on the inputs, `one` or `other`: they would mix tasks.
    """
    if next(module.buffers(), None) is None:
        return False
    found, again = written(module, one), written(module, other)
    for name, value in found.items():
        if name not in again or not torch.equal(value, again[name]):
            owner, _, own = name.rpartition(".")
            kind = type(module.get_submodule(owner)).__name__
            why = f"its buffer {own} depends on the inputs of all tasks, which mixes tasks: leave such statistics out"
            raise UserError(f"base_layer.{owner} ({kind}): {why}")
    return bool(found)


def written(module: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """The buffers that a forward pass writes to, with the values it leaves; the module's own stay as they are."""
    before = dict(module.named_buffers())
    copies = {name: buffer.clone() for name, buffer in before.items()}
    with swap_tensors(module, dict(copies)):
        refresh(module, examples)
        after = {name: buffer for name, buffer in module.named_buffers() if name in copies}
    return {
        name: buffer
        for name, buffer in after.items()
        if buffer is not copies[name] or version_of(buffer) or not torch.equal(buffer, before[name])
    }


def refresh(module: nn.Module, examples: Examples) -> None:
    """A forward pass in training mode on the first task, after which the buffers follow the parameters as they are."""
    was_training = module.training
    module.train()
    try:
        with torch.no_grad(), fork_rng(examples.x.device):
            module(examples.x[0], examples.mask[0])
    finally:
        module.train(was_training)
