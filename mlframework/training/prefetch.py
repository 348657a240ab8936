"""The episodes of a training, drawn one by one or ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode

__all__ = ["Prefetch"]


class Drawn(NamedTuple):
    """An episode, and the state of its generator just after."""

    episode: Episode
    state: Tensor


class Prefetch:
    """Hands out a training's episodes in the order of its generator.

    The draws are the same with a thread and without. The training's generator stands where the last episode that was
    handed out has left it: episodes that were drawn ahead are no part of a checkpoint. An error of drawing is raised
    where its episode is asked for.

    Args:
        draw: the next episode from a generator, on the device of the step.
        generator: that of the training.
        ahead: episodes that a thread draws ahead; 0: no thread.
    """

    def __init__(self, draw: Callable[[torch.Generator], Episode], generator: torch.Generator, *, ahead: int) -> None:
        self.draw, self.generator = draw, generator
        self.worker = Worker(draw, generator, ahead) if ahead else None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.worker is not None:
            self.worker.stop()

    def next(self) -> Episode:
        """The next episode."""
        if self.worker is None:
            return self.draw(self.generator)
        episode, state = self.worker.take()
        self.generator.set_state(state)
        return episode


class Worker:
    """A thread that draws ahead, from a generator of its own; see `Prefetch`."""

    def __init__(self, draw: Callable[[torch.Generator], Episode], generator: torch.Generator, ahead: int) -> None:
        self.draw = draw
        self.generator = torch.Generator().set_state(generator.get_state())
        self.room = threading.Semaphore(ahead)
        self.drawn: queue.SimpleQueue[Drawn | BaseException] = queue.SimpleQueue()
        self.stopped = False
        self.thread = threading.Thread(target=self.run, name="prefetch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        while self.room.acquire() and not self.stopped:
            try:
                episode = self.draw(self.generator)
            except BaseException as error:  # raised again where the episode is waited for, whatever it is
                self.drawn.put(error)
                return
            self.drawn.put(Drawn(episode, self.generator.get_state()))

    def take(self) -> Drawn:
        """The next episode, waited for if need be."""
        drawn = self.drawn.get()
        if isinstance(drawn, BaseException):
            raise drawn
        self.room.release()
        return drawn

    def stop(self) -> None:
        """Ends the thread, after the draw that it is at."""
        self.stopped = True
        self.room.release()
        self.thread.join()
