"""Whether a compiled step gives what the eager one gives, although rounding makes some gradients jump."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mlframework.backend.compiled import Gradients, NotCapturable
from mlframework.episode import Episode, Examples
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["Undecided", "Way", "in_float64", "verify_against_eager"]

#: Relative differences from the eager losses, and from the eager meta-gradient as a whole, that rounding explains where
#: nothing jumps.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-10, 1e-9)}
COARSE = (1e-2, 1e-2)

#: Eager steps with parameters that are some roundings off, and how many times farther than these scatter a compiled
#: step may be: it is another draw, and jumps are of all sizes.
PERTURBATIONS, ULPS, SCATTER_FACTOR = 4, 4, 3.0

#: How far losses and meta-gradient may be off for them to be worth a look in float64: sums of many numbers are further
#: off than roundings of parameters tell.
NEARLY = (1e-3, 0.1)

#: How many tasks are tried alone.
ALONE = 4

#: How the meta-gradient of an episode is found.
Way = Callable[[MetaLayer, Episode], Gradients]


class Undecided(NotCapturable):
    """The difference may be rounding, and may not: rounding moves the eager meta-gradient too far, or nearly as far."""


def verify_against_eager(meta_layer: MetaLayer, way: Way, eagerly: Way, episode: Episode) -> None:
    """Raises `NotCapturable` where a compiled way gives something else than the eager one, or `Undecided`.

    Two episodes are tried: the one at hand, and the same with each task's inputs in reverse order, which are new to it.
    Where rounding turns over a rectifier or a maximum, a gradient jumps, by per cents of the whole. So a difference is
    accepted where the eager step jumps about as far when its parameters are moved by roundings. But then some episode
    has to agree as it is: one of the two, or one of a single task, in which something turns over more rarely.
    """
    tried = [agrees(meta_layer, way, eagerly, one) for one in (episode, reversed_inputs(episode))]
    alone = (repeated(episode, task) for task in range(min(ALONE, episode.num_tasks)))
    if not any(tried) and not any(agrees(meta_layer, way, eagerly, one) for one in alone):
        raise Undecided("rounding moves the eager meta-gradient so far that the graph's cannot be judged by it")


def agrees(meta_layer: MetaLayer, way: Way, eagerly: Way, episode: Episode) -> bool:
    """Whether an episode's losses and meta-gradient are the eager ones; False where the eager ones jump as far.

    Raises:
        NotCapturable: they differ by more than that.
    """
    found, eager = way(meta_layer, episode), eagerly(meta_layer, episode)
    off = differences(found, eager)
    limits = torch.tensor(TOLERANCES.get(eager.losses.dtype, COARSE))
    if bool((off <= limits).all()):
        return True
    scatter = scattered(meta_layer, eagerly, episode, eager)
    if not bool((off <= torch.maximum(limits, SCATTER_FACTOR * scatter)).all()):
        doubtful = bool((off <= torch.tensor(NEARLY)).all())
        raise (Undecided if doubtful else NotCapturable)(
            f"the graph's losses and meta-gradient are {off[0]:.1e} and {off[1]:.1e} off the eager ones, "
            f"which rounding moves by {scatter[0]:.1e} and {scatter[1]:.1e}"
        )
    return False


def scattered(meta_layer: MetaLayer, eagerly: Way, episode: Episode, eager: Gradients) -> Tensor:
    """How far roundings move the eager losses and meta-gradient, at most: `[2]`."""
    moved = []
    for seed in range(PERTURBATIONS):
        with nudged(meta_layer, seed):
            moved.append(differences(eagerly(meta_layer, episode), eager))
    return torch.stack(moved).amax(0)


@contextmanager
def nudged(module: nn.Module, seed: int) -> Iterator[None]:
    """Parameters that are a few roundings larger or smaller, each number by chance, and then as they were."""
    generator = torch.Generator().manual_seed(seed)
    before = [(p, p.detach().clone()) for p in module.parameters() if p.is_floating_point()]
    try:
        with torch.no_grad():
            for p, _ in before:
                signs = 2 * torch.randint(2, p.shape, generator=generator) - 1
                p.mul_(1 + ULPS * torch.finfo(p.dtype).eps * signs.to(p))
        yield
    finally:
        with torch.no_grad():
            for p, kept in before:
                p.copy_(kept)


def in_float64(meta_layer: MetaLayer, episode: Episode) -> tuple[MetaLayer, Episode]:
    """A copy of an algorithm, of the same task distribution, and an episode, with far smaller roundings."""
    double = copy.deepcopy(meta_layer, {id(meta_layer.task): meta_layer.task}).double()
    parts = (Examples(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in part)) for part in episode)
    return double, Episode(*parts)


def reversed_inputs(episode: Episode) -> Episode:
    """Tasks in which the first target has the last input."""
    support, query = (part._replace(x=lying_as(part.x, part.x.flip(1))) for part in episode)
    return Episode(support, query)


def repeated(episode: Episode, task: int) -> Episode:
    """As many tasks, all of them one."""
    return Episode(*(Examples(*(lying_as(leaf, leaf[task]) for leaf in part)) for part in episode))


def lying_as(tensor: Tensor, values: Tensor) -> Tensor:
    """Values that lie in memory as a tensor does, which a graph takes for granted; expanded axes stay so."""
    values = values.expand_as(tensor)
    for axis, stride in enumerate(tensor.stride()):
        values = values if stride else values.narrow(axis, 0, 1)
    own = torch.empty_strided(values.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return own.copy_(values).expand_as(tensor)


def differences(found: Gradients, eager: Gradients) -> Tensor:
    """How far losses and meta-gradient are from the eager ones, each as a share of their norm: `[2]`.

    Of the whole, because some parameters' gradients are zero but for rounding, as a bias before a batch norm.

    Raises:
        NotCapturable: they are not of the same parameters, or lie otherwise in memory, at which fused optimizers do not
            look.
    """
    if found.by_name.keys() != eager.by_name.keys():
        raise NotCapturable("the graph has gradients for other parameters than the eager step")
    for name, grad in found.by_name.items():
        if not lies_as(grad, eager.by_name[name]):
            raise NotCapturable(f"the graph's gradient of {name} lies otherwise in memory than the eager one")
    return torch.stack([share(found.losses, eager.losses), share(whole(found), whole(eager))]).cpu()


def lies_as(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their numbers in the same order in memory."""
    strides = zip(x.stride(), other.stride(), x.shape, strict=True)
    return all(one == two or size == 1 for one, two, size in strides)


def share(found: Tensor, eager: Tensor) -> Tensor:
    return (found - eager).norm() / eager.norm().clamp(min=torch.finfo(eager.dtype).tiny)


def whole(gradients: Gradients) -> Tensor:
    """All gradients as one vector, in the order of the parameters' names."""
    return torch.cat([grad.flatten() for _, grad in sorted(gradients.by_name.items())])
