"""A base layer against the spec of its task: run once when it is built, so that its mistakes are found there."""

from __future__ import annotations

import functools
import os
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlframework.backend.forward import fork_rng, swap_tensors
from mlframework.base_layers.base_layer import BaseLayer, PlainLayer, as_base_layer
from mlframework.episode import TaskSpec
from mlframework.errors import FailedRun, UserError

__all__ = ["TWO_OUTPUTS", "Call", "check_base_layer", "culprit", "explained", "moved", "recorded_calls"]

#: What rounding may change in a prediction, relative to the largest one.
ROUNDING = 1e-3

TWO_OUTPUTS = (
    "gives two outputs for one input in evaluation mode: there it must neither draw random numbers nor keep state "
    "between calls"
)


class Call(NamedTuple):
    name: str  # of the module in the base layer
    module: nn.Module
    given: object  # its first argument
    output: object

    def __str__(self) -> str:
        """The module as messages name it, as in `base_layer.features.0 (Linear)`."""
        return f"{'.'.join(filter(None, ['base_layer', self.name]))} ({type(self.module).__name__})"


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[Call]]:
    """Collects the calls of a module and of all its parts within the context; inner ones end, and stand, first."""
    calls: list[Call] = []

    def record(part: nn.Module, args: tuple[Any, ...], output: object, *, name: str) -> None:
        calls.append(Call(name, part, args[0] if args else None, output))

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            hooks.enter_context(part.register_forward_hook(functools.partial(record, name=name)))
        yield calls


def check_base_layer(base_layer: nn.Module, spec: TaskSpec) -> None:
    """Runs a base layer, or a plain module, on two inputs of zeros, in evaluation and in training mode.

    Parameters that a module makes in its first call are there afterwards.

    Raises:
        UserError: one line that names the module at fault and says what would be right.
    """
    base_layer = as_base_layer(base_layer)
    x, was_training = spec.zeros(2), base_layer.training
    positions = spec.x_shape if spec.kind == "sequence" else ()
    for mode in ("evaluation", "training"):
        base_layer.train(mode == "training")
        with explained(base_layer, f"in {mode} mode"):
            prediction = base_layer(x) if mode == "evaluation" else in_training(base_layer, x)
        check_output(base_layer, prediction, (2, *positions, spec.out_features))
    if spec.out_features > 1 or spec.kind != "sequence":  # there is another input
        check_repeats(base_layer.eval(), x)
    base_layer.train(was_training)


def in_training(base_layer: BaseLayer, x: Tensor) -> Tensor:
    """A prediction whose derivatives are wanted; buffers and random numbers stay as they are."""
    copies = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
    with torch.enable_grad(), fork_rng(x.device), swap_tensors(base_layer, copies), recorded_calls(base_layer) as calls:
        prediction: Tensor = base_layer(x)
    if isinstance(prediction, Tensor) and not prediction.requires_grad and any(map(needs_gradient, calls)):
        culprit = next(call for call in calls if needs_gradient(call) and not requires_grad(call.output))
        why = "its output is detached, so that no gradient reaches it: leave that out"
        raise UserError(f"{culprit}: {why}")
    return prediction


def needs_gradient(call: Call) -> bool:
    """Whether a gradient should pass through a call, or begin in it."""
    return requires_grad(call.given) or any(p.requires_grad for p in call.module.parameters(recurse=False))


def requires_grad(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def check_repeats(base_layer: BaseLayer, x: Tensor) -> None:
    """In evaluation mode one input has one output, whatever the random numbers and the inputs before."""
    found = []
    for seed in (0, 1):
        with torch.no_grad(), fork_rng(x.device):
            torch.manual_seed(seed)
            with recorded_calls(base_layer) as calls:
                base_layer(x)
            base_layer(x + 1)
        found.append(calls)
    if call := culprit(found):
        raise UserError(f"{call}: {TWO_OUTPUTS}")


def moved(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by more than rounding; values that are not finite do not count."""
    difference, size = (one - other).abs().max(), one.abs().max()
    return bool(difference > ROUNDING * size)


def culprit(found: Sequence[list[Call]], rows: slice = slice(None)) -> Call | None:
    """The first call whose output differs in some rows; None: no module of the base layer is at fault."""
    for first, second in zip(*found, strict=False):
        outputs = (first.output, second.output)
        if all(isinstance(output, Tensor) and output.dim() and output.is_floating_point() for output in outputs):
            kept = [output[rows] for output in outputs if isinstance(output, Tensor)]
            if kept[0].shape == kept[1].shape and kept[0].numel() and moved(*kept):
                return first
    return None


def check_output(base_layer: BaseLayer, prediction: object, wanted: tuple[int, ...]) -> None:
    if not isinstance(prediction, Tensor):
        raise UserError(f"base_layer: returns a {type(prediction).__name__}, and must return one tensor of predictions")
    if tuple(prediction.shape) != wanted:
        plain, given = isinstance(base_layer, PlainLayer), tuple(prediction.shape)
        name, last = ("base_layer", base_layer.features) if plain else ("base_layer.head", base_layer.head)
        raise UserError(f"{name} ({type(last).__name__}): returns {given} for two inputs, and must return {wanted}")


@contextmanager
def explained(base_layer: nn.Module, when: str, otherwise: str = "base_layer") -> Iterator[None]:
    """Turns whatever is raised inside into one line that names the innermost module that it came from.

    What has words of its own, and what is the machine's fault, comes through. `when` ends the sentence "... fails";
    `otherwise` names the culprit where no module of the base layer had a part in it.
    """
    try:
        yield
    except (UserError, FailedRun, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a user's module may raise
        calls = {id(module): Call(name, module, None, None) for name, module in base_layer.named_modules()}
        frames = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        inside = [calls[frame] for frame in frames if frame in calls]
        who = str(inside[-1]) if inside else otherwise
        raise UserError(f"{who}: fails {when}: {said(error)}") from error


def said(error: Exception) -> str:
    """An error on one line, with the last place that is not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename][-1]
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
    return f"{text} ({last.filename}:{last.lineno})"
