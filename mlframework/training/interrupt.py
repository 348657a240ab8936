"""Ctrl-C and the signals by which others end a process: in a training they are obeyed only between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mlframework import processes

__all__ = ["DeferredInterrupt", "Stopped", "heeding_signals", "stopped_by"]

#: `kill` and all schedulers, a terminal that closes, and the warnings that time runs out: of SLURM and Grid Engine
#: (SIGUSR1), of LSF and submitit (SIGUSR2), of a limit on processor time (SIGXCPU).
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Stopped(KeyboardInterrupt):
    """Another signal than that of Ctrl-C asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stopped_by(number: int) -> KeyboardInterrupt:
    """What a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """The handler of a command. A second signal kills the process, and so does one in a process that was forked."""
    for each in SIGNALS:
        if signal.getsignal(each) is raise_stopped:
            signal.signal(each, signal.SIG_DFL)
    if os.getpid() != PROCESS:
        os.kill(os.getpid(), number)
    raise Stopped(number)


#: The process whose command heeds signals.
PROCESS = 0


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Within this context `SIGNALS` raise `Stopped`, instead of killing the process without a word.

    A signal that is ignored, as SIGHUP under `nohup`, or that other code handles, is left alone.
    """
    global PROCESS
    PROCESS = os.getpid()
    heeded = [number for number in SIGNALS if in_main_thread() and signal.getsignal(number) is signal.SIG_DFL]
    for number in heeded:
        signal.signal(number, raise_stopped)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class DeferredInterrupt:
    """Within this context Ctrl-C and `SIGNALS` are noted as `asked`, instead of raised in the middle of a step.

    Ctrl-C twice is raised. Other signals may come twice, from a scheduler and from a launcher, and mean the same.
    Raised inside Python's queues and semaphores it loses a wake-up, and joining a thread that waits for work hangs.
    Where a signal is ignored or handled by other code, and outside the main thread, nothing is changed.
    """

    #: The number of the first signal; 0 as long as there is none.
    asked: int

    def __enter__(self) -> DeferredInterrupt:
        self.asked, self.process, self.before = 0, os.getpid(), dict[int, Any]()
        ours = (signal.default_int_handler, raise_stopped)
        for number in (signal.SIGINT, *SIGNALS) if in_main_thread() else ():
            handler = signal.getsignal(number)
            if handler in ours or (handler is signal.SIG_DFL and number != signal.SIGINT):
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that was forked dies as it would have done
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # Each of several ranks gets Ctrl-C twice, from the terminal and from torchrun; rank 0 speaks.
        twice = number == signal.SIGINT and processes.count() == 1
        if self.asked == number and twice:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        if not processes.leads():
            return
        name = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
        again = ", or at once if interrupted again" if twice else ""
        # Not print: the signal may have come in the middle of a print. Nor may the reader of stderr still be there.
        with suppress(OSError):
            os.write(2, f"\n{name}: stops after this step{again}\n".encode())

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
