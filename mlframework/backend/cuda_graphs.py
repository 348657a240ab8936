"""A captured step on a GPU, recorded once and replayed: calling its kernels takes longer than running them."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from mlframework.backend.algorithm import Algorithm, GradientFn, Gradients, tensors_of
from mlframework.backend.private import copies, tree_leaves, tree_map, tree_map_only
from mlframework.backend.tracing import LATER, NotCapturable, changes_with_step, tracing
from mlframework.backend.verify import differences, stored, with_layout
from mlframework.episode import Episode

__all__ = ["RecordedStep", "as_cuda_graph"]

#: Steps before one is recorded, in which everything is allocated and tuned that is so only once.
WARM_UP = 3

#: The relative difference of sums in another order.
ROUNDING = 1e-5

log = logging.getLogger(__name__)


def as_cuda_graph(step: GradientFn, meta_layer: Algorithm, episode: Episode) -> GradientFn:
    """A step as a CUDA graph, where that gives the same at every outer step; else, and on a CPU, as it is."""
    if episode.device.type != "cuda":
        return step
    try:
        now = step(meta_layer, episode)
        with tracing(meta_layer, LATER):
            later = step(meta_layer, episode)
        if bool((differences(later, now) > ROUNDING).any()):
            raise changes_with_step(meta_layer)
        return RecordedStep(step, meta_layer, episode)
    except (NotCapturable, RuntimeError) as error:  # or it waits for the GPU, as a solver that branches on values does
        log.info("capture: not recorded: %s", str(error).partition("\n")[0])
        return step


class RecordedStep:
    """The kernels of a step, for episodes of one shape, without the Python between them.

    All memory of a step stays taken. If parameters have moved, the step is recorded anew, or called where that fails.

    Raises:
        RuntimeError: the step waits for the GPU.
    """

    def __init__(self, step: GradientFn, meta_layer: Algorithm, episode: Episode) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.record(meta_layer, episode)

    def record(self, meta_layer: Algorithm, episode: Episode) -> None:
        self.addresses, self.graph = addresses(meta_layer), None
        with torch.cuda.device(episode.device):
            self.episode = tree_map(lambda leaf: with_layout(leaf, leaf), episode)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(meta_layer, self.episode)
                with waiting_is_an_error():
                    for _ in range(WARM_UP - 1):
                        self.step(meta_layer, self.episode)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.found = self.step(meta_layer, self.episode)
        self.graph = graph

    def __call__(self, meta_layer: Algorithm, episode: Episode) -> Gradients:
        if addresses(meta_layer) != self.addresses:
            with suppress(RuntimeError):
                self.record(meta_layer, episode)
        if self.graph is None:
            return self.step(meta_layer, episode)
        for own, leaf in zip(itertools.chain(*self.episode), itertools.chain(*episode), strict=True):
            stored(own, own.stride()).copy_(stored(leaf, leaf.stride()))
        self.graph.replay()
        return copied(self.found)


def addresses(meta_layer: Algorithm) -> list[int]:
    """Where in memory the parameters and buffers are."""
    return [tensor.data_ptr() for tensor in tensors_of(meta_layer).values()]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raises a RuntimeError where a step waits for the GPU; met while recording, that would spoil the graph."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it does not find all of them: the rest ends the recording
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def copied(found: Gradients) -> Gradients:
    """The same in memory of its own, copied by one kernel."""
    own = iter(copies([leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]))
    return tree_map_only(Tensor, lambda leaf: next(own), found)
