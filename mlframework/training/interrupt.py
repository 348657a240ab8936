"""Ctrl-C, obeyed only between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Interrupt", "deferred_interrupt"]


class Interrupt:
    """Whether Ctrl-C was pressed; pressed again, it raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the signal may have come in the middle of a print. Nor may the reader of stderr still be there.
        with suppress(OSError):
            os.write(2, b"\ninterrupted: stops after this step, or at once if interrupted again\n")


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Notes Ctrl-C for the caller, instead of raising it in the middle of a step.

    Raised inside Python's queues and semaphores it loses a wake-up, and joining a thread that waits for work hangs.
    Where Ctrl-C is ignored or handled by other code, and outside the main thread, nothing is changed.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
