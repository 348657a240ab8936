"""Whether a compiled step gives the eager one's results, although rounding makes some gradients jump."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mlframework.backend.algorithm import Algorithm, GradientFn, Gradients
from mlframework.backend.private import swap_tensors, tree_map
from mlframework.backend.tracing import NotCapturable
from mlframework.episode import Episode

__all__ = ["Undecided", "are_small", "differences", "in_float64", "verify_against_eager"]

#: Relative differences that rounding explains where nothing jumps: of the losses, and of the meta-gradient as a whole.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-10, 1e-9)}
COARSE = (1e-2, 1e-2)

#: Eager steps with parameters that are some ULPS off, and how many times farther than these a compiled step may be:
#: jumps are of all sizes.
PERTURBATIONS, ULPS, SCATTER_FACTOR = 4, 4, 3.0

#: The largest differences of losses and meta-gradient that are worth a look in float64: sums of many numbers differ by
#: more than perturbed parameters tell.
NEARLY = (1e-3, 0.1)

#: The most tasks that are tried alone.
ALONE = 4


class Undecided(NotCapturable):
    """float32 cannot decide: rounding moves the eager meta-gradient too far, or nearly as far as the difference."""


def verify_against_eager(meta_layer: Algorithm, step: GradientFn, eager: GradientFn, episode: Episode) -> None:
    """Raises `NotCapturable` where a compiled step gives other results than the eager one, or `Undecided`.

    Two episodes are tried: the one at hand, and the same with each task's inputs in reverse order. Where rounding turns
    over a rectifier or a maximum, a gradient jumps, by per cents of the whole. So a difference is accepted where the
    eager step jumps about as far when its parameters are perturbed. But then some episode has to agree as it is: one of
    the two, or one of a single task, in which something turns over more rarely.
    """
    tried = [agrees(meta_layer, step, eager, one) for one in (episode, reversed_inputs(episode))]
    alone = (repeated(episode, task) for task in range(min(ALONE, episode.num_tasks)))
    if not any(tried) and not any(agrees(meta_layer, step, eager, one) for one in alone):
        raise Undecided("rounding moves the eager meta-gradient so far that the graph's cannot be judged by it")


def agrees(meta_layer: Algorithm, step: GradientFn, eager: GradientFn, episode: Episode) -> bool:
    """Whether losses and meta-gradient are the eager ones; False where these jump as far; `NotCapturable` otherwise."""
    expected = eager(meta_layer, episode)
    off = differences(step(meta_layer, episode), expected)
    if are_small(off, expected.losses.dtype):
        return True
    moved = []
    for seed in range(PERTURBATIONS):
        with perturbed(meta_layer, seed):
            moved.append(differences(eager(meta_layer, episode), expected))
    scatter = torch.stack(moved).amax(0)
    if not are_small(off, expected.losses.dtype, scatter):
        doubtful = bool((off <= torch.tensor(NEARLY)).all())
        raise (Undecided if doubtful else NotCapturable)(
            f"the graph's losses and meta-gradient are {off[0]:.1e} and {off[1]:.1e} off the eager ones, "
            f"which rounding moves by {scatter[0]:.1e} and {scatter[1]:.1e}"
        )
    return False


def are_small(off: Tensor, dtype: torch.dtype, scatter: Tensor | float = 0.0) -> bool:
    """Whether rounding explains differences, where perturbations make as large ones as `scatter`."""
    limits = torch.tensor(TOLERANCES.get(dtype, COARSE))
    return bool((off <= torch.maximum(limits, SCATTER_FACTOR * torch.as_tensor(scatter))).all())


def perturbed(module: Algorithm, seed: int) -> AbstractContextManager[Any]:
    """Within this context parameters are some ULPS larger or smaller, each number at random."""
    generator = torch.Generator().manual_seed(seed)

    def moved(p: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, p.shape, generator=generator) - 1
        return (p.detach() * (1 + ULPS * torch.finfo(p.dtype).eps * signs.to(p))).requires_grad_(p.requires_grad)

    held = {name: moved(p) for name, p in module.named_parameters() if p.is_floating_point()}
    return swap_tensors(cast(nn.Module, module), held)


def in_float64(meta_layer: Algorithm, episode: Episode) -> tuple[Algorithm, Episode]:
    """A copy of an algorithm, with the same task distribution, and an episode, in float64."""
    task = getattr(meta_layer, "task", None)
    double = cast(Any, copy.deepcopy(meta_layer, {id(task): task})).double()
    return double, tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, episode)


def reversed_inputs(episode: Episode) -> Episode:
    """Tasks in which the first target has the last input."""
    support, query = (part._replace(x=with_layout(part.x, part.x.flip(1))) for part in episode)
    return Episode(support, query)


def repeated(episode: Episode, task: int) -> Episode:
    """An episode of as many tasks, which are all the same one."""
    return tree_map(lambda leaf: with_layout(leaf, leaf[task]), episode)


def with_layout(tensor: Tensor, values: Tensor) -> Tensor:
    """Values in the memory layout of a tensor, on which a graph depends; expanded axes stay expanded."""
    values = stored(values.expand_as(tensor), tensor.stride())
    own = torch.empty_strided(values.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return own.copy_(values).expand_as(tensor)


def stored(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """A tensor without the repetitions of axes that are expanded in memory with such strides."""
    for axis, stride in enumerate(strides):
        tensor = tensor if stride else tensor.narrow(axis, 0, 1)
    return tensor


def differences(found: Gradients, eager: Gradients) -> Tensor:
    """How far losses and meta-gradient are from the eager ones, each as a share of their whole norm: `[2]`.

    Raises:
        NotCapturable: they are of other parameters, or have another memory layout, on which fused optimizers rely.
    """
    if found.by_name.keys() != eager.by_name.keys():
        raise NotCapturable("the graph has gradients for other parameters than the eager step")
    for name, grad in found.by_name.items():
        strides = zip(grad.stride(), eager.by_name[name].stride(), grad.shape, strict=True)
        if any(one != two and size != 1 for one, two, size in strides):
            raise NotCapturable(f"the graph's gradient of {name} lies otherwise in memory than the eager one")
    whole = [torch.cat([each.by_name[name].flatten() for name in sorted(eager.by_name)]) for each in (found, eager)]
    parts = (found.losses, eager.losses), whole
    shares = [(x - y).norm() / y.norm().clamp(min=torch.finfo(y.dtype).tiny) for x, y in parts]
    return torch.stack(shares).cpu()
