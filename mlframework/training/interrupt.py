"""Ctrl-C, obeyed only between steps."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

__all__ = ["DeferredInterrupt"]


class DeferredInterrupt:
    """Within this context Ctrl-C is noted as `asked`, instead of raised in the middle of a step; twice, it is raised.

    Raised inside Python's queues and semaphores it loses a wake-up, and joining a thread that waits for work hangs.
    Where Ctrl-C is ignored or handled by other code, and outside the main thread, nothing is changed.
    """

    def __enter__(self) -> DeferredInterrupt:
        self.asked = False
        in_main = threading.current_thread() is threading.main_thread()
        self.handles = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.handles:
            signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the signal may have come in the middle of a print. Nor may the reader of stderr still be there.
        with suppress(OSError):
            os.write(2, b"\ninterrupted: stops after this step, or at once if interrupted again\n")

    def __exit__(self, *error: object) -> None:
        if self.handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)
