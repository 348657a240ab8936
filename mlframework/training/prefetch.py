"""The episodes of a training, drawn ahead in a thread where that makes its steps faster."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode

__all__ = ["Prefetch"]

#: A thread is tried where drawing takes more than this share of a step.
SHARE = 0.05

#: Steps whose median says what a step takes.
WINDOW = 20


class Drawn(NamedTuple):
    """An episode, and the state of its generator just after."""

    episode: Episode
    state: Tensor


class Prefetch:
    """Hands out a training's episodes in the order of its generator.

    They are drawn when they are asked for or, by a thread, ahead. The thread is tried where drawing takes a good part
    of a step, and kept if the steps are faster then: in python the two take turns, and where both are made of many
    small operations, waiting for one's turn costs more than is gained.

    Either way the draws are the same, and the training's generator stands where the last episode that was handed out
    has left it: what was drawn ahead of that is no part of a checkpoint. What drawing raises is raised where that
    episode is asked for.

    Args:
        draw: the next episode from a generator, on the device of the step.
        generator: that of the training.
        ahead: episodes drawn ahead at most; 0 never starts a thread.
    """

    def __init__(self, draw: Callable[[torch.Generator], Episode], generator: torch.Generator, *, ahead: int) -> None:
        self.draw, self.generator, self.ahead = draw, generator, ahead
        self.worker: Worker | None = None
        self.asked: float | None = None
        self.draws: list[float] = []
        self.steps: list[float] = []
        self.to_beat: float | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def next(self) -> Episode:
        """The next episode."""
        now = time.perf_counter()
        if self.asked is not None:
            self.steps.append(now - self.asked)
        self.asked = now
        if len(self.steps) == WINDOW:
            self.choose(statistics.median(self.steps))
            self.steps.clear()
        if self.worker is not None:
            episode, state = self.worker.take()
            self.generator.set_state(state)
            return episode
        began = time.perf_counter()
        episode = self.draw(self.generator)
        self.draws.append(time.perf_counter() - began)
        return episode

    def choose(self, step: float) -> None:
        """Starts the thread where it may pay, and ends it for good where it did not.

        Args:
            step: what a step took of late, with its draw, in seconds.
        """
        if self.worker is None and self.ahead and statistics.median(self.draws) > SHARE * step:
            self.worker, self.to_beat = Worker(self.draw, self.generator, self.ahead), step
        elif self.to_beat is not None:
            if step >= self.to_beat:
                self.stop()
                self.ahead = 0
            self.to_beat = None
        self.draws.clear()

    def stop(self) -> None:
        """Ends the thread, if there is one."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


class Worker:
    """A thread that draws ahead, from a generator of its own.

    Args:
        draw: see `Prefetch`.
        generator: where it starts.
        ahead: see `Prefetch`.
    """

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
            except BaseException as error:  # to be raised where the episode is waited for, whatever it is
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
