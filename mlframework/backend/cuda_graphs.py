"""A captured step on a GPU, recorded once and replayed: to call its kernels takes longer than they do."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from mlframework.backend.compiled import LATER, Gradients, found_at, places_of
from mlframework.backend.devices import UNDISTURBED
from mlframework.backend.traced_int import TracedInt
from mlframework.backend.verify import Way, differences, lying_as
from mlframework.episode import Episode, Examples
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["Recorded", "recorded"]

#: Steps before one is recorded, in which all is allocated and tuned that is so only once.
WARM_UP = 3

#: Relative; what sums in another order are off.
ROUNDING = 1e-5

log = logging.getLogger(__name__)


def recorded(way: Way, meta_layer: MetaLayer, episode: Episode) -> Way:
    """A way as a CUDA graph, where that gives the same at every step; else, and on a CPU, as it is."""
    if episode.device.type != "cuda":
        return way
    try:
        if changes_with_step(way, meta_layer, episode):
            log.info("capture: not recorded: it gives something else at another outer step")
            return way
        return Recorded(way, meta_layer, episode)
    except RuntimeError as error:  # it waits for the GPU, as a solver that branches on values does
        log.info("capture: not recorded: %s", str(error).partition("\n")[0])
        return way


def changes_with_step(way: Way, meta_layer: MetaLayer, episode: Episode) -> bool:
    """Whether a way looks at the number of the outer step, or gives something else with another."""
    now = way(meta_layer, episode)
    before, meta_layer.outer_step = meta_layer.outer_step, TracedInt(meta_layer.outer_step + LATER)
    try:
        later = way(meta_layer, episode)
        return meta_layer.outer_step.touched or bool((differences(later, now) > ROUNDING).any())
    finally:
        meta_layer.outer_step = before


class Recorded:
    """The kernels of a way, for episodes of one shape: what python does beside them is done no more.

    What it returns is its own: the next step does not touch it. All that a step holds in between stays taken.

    Args:
        way: what is recorded.
        meta_layer: its parameters are read where they are; if they are elsewhere, it is recorded anew, or else no
            more.
        episode: the first of its shape.

    Raises:
        RuntimeError: the way waits for the GPU.
    """

    def __init__(self, way: Way, meta_layer: MetaLayer, episode: Episode) -> None:
        self.way = way
        self.places = places_of(meta_layer)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.record(meta_layer, episode)

    def record(self, meta_layer: MetaLayer, episode: Episode) -> None:
        self.addresses, self.graph = self.addresses_now(), None
        with UNDISTURBED, torch.cuda.device(episode.device):
            self.graph = self.recording(meta_layer, episode)

    def recording(self, meta_layer: MetaLayer, episode: Episode) -> torch.cuda.CUDAGraph:
        self.episode = Episode(*(Examples(*(lying_as(leaf, leaf) for leaf in part)) for part in episode))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.warm_up(meta_layer)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.found = self.way(meta_layer, self.episode)
        return graph

    def warm_up(self, meta_layer: MetaLayer) -> None:
        """Takes some steps; raises a RuntimeError where one waits for the GPU."""
        self.way(meta_layer, self.episode)
        with waiting_is_an_error():
            for _ in range(WARM_UP - 1):
                self.way(meta_layer, self.episode)

    def addresses_now(self) -> list[int]:
        return [tensor.data_ptr() for tensor in found_at(self.places)]

    def __call__(self, meta_layer: MetaLayer, episode: Episode) -> Gradients:
        if self.addresses_now() != self.addresses:
            with suppress(RuntimeError):
                self.record(meta_layer, episode)
        if self.graph is None:
            return self.way(meta_layer, episode)
        for own, leaf in zip(itertools.chain(*self.episode), itertools.chain(*episode), strict=True):
            stored(own).copy_(stored(leaf))
        self.graph.replay()
        return copied(self.found)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raises a RuntimeError at what waits for the GPU, before it is met in a recording, which it would spoil."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all of it is found: the rest ends the recording
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def stored(tensor: Tensor) -> Tensor:
    """A tensor without the repetitions of expanded axes."""
    for axis, stride in enumerate(tensor.stride()):
        tensor = tensor if stride else tensor.narrow(axis, 0, 1)
    return tensor


def copied(found: Gradients) -> Gradients:
    """The same in memory of its own."""
    metrics, conclusion = found.metrics, found.conclusion
    by_name = dict(zip(found.by_name, copies(found.by_name.values()), strict=True))
    losses, *values = copies([found.losses, *metrics.values()])
    if conclusion is not None:
        norm, total, *means = copies([conclusion.norm, conclusion.total, *conclusion.means.values()])
        conclusion = conclusion._replace(norm=norm, total=total, means=dict(zip(conclusion.means, means, strict=True)))
    return Gradients(losses, dict(zip(metrics, values, strict=True)), by_name, conclusion)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    tensors = list(tensors)
    numbers = bool(tensors) and all(tensor.is_floating_point() for tensor in tensors)
    return list(torch._foreach_mul(tensors, 1)) if numbers else [tensor.clone() for tensor in tensors]  # at once
