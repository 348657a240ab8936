"""Ctrl-C, heeded where nothing is half done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Interrupt", "deferred_interrupt"]

STDERR = 2


class Interrupt:
    """Whether Ctrl-C was pressed; the second time, `KeyboardInterrupt` is raised where the program is."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: whom the signal has interrupted may be printing. Who was reading may have been interrupted as well.
        with suppress(OSError):
            os.write(STDERR, b"\ninterrupted: stops after this step, or at once if interrupted again\n")


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Keeps Ctrl-C for the caller to heed, instead of raising it in the middle of anything.

    Raised in python's own queues and semaphores it loses a wake-up: then a thread that waits for work is joined in
    vain. Where Ctrl-C is ignored or another's, and outside the main thread, nothing is changed.
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
