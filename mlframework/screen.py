"""Stages of a command's work, one within another, the screen that tells them, and output that nobody may read."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO

__all__ = ["LastingStream", "Screen", "Stage", "lasting_streams", "showing", "stage"]

#: Seconds between looks at the stages, and until a new stage without a terminal has a line.
TICK, SETTLED = 0.25, 0.5
#: Without a terminal no more than so many seconds, or this share of the time so far, pass between two lines.
SILENCE, SHARE = 5.0, 0.02


class Stage:
    """A piece of work with its count, such as `validating 50/100`; `note` stands behind it."""

    def __init__(self, name: str, total: int | None = None, done: float = 0) -> None:
        self.name, self.total, self.done, self.note = name, total, done, ""
        self.first, self.began = done, time.perf_counter()

    def __str__(self) -> str:
        count = "" if self.total is None else f" {self.done:.0f}/{self.total}"
        return ", ".join(filter(None, [self.name + count, self.note, self.time_left()]))

    def time_left(self) -> str:
        """The time until the count is full, at the pace so far; nothing for a short stage."""
        passed, steps = time.perf_counter() - self.began, self.done - self.first
        if self.total is None or steps <= 0 or passed < 2 or self.done >= self.total:
            return ""
        return f"{shown_time(passed / steps * (self.total - self.done))} left"


#: The stages at work, the outermost first. A screen reads them from a thread of its own.
STAGES: list[Stage] = []


@contextmanager
def stage(name: str, total: int | None = None, done: int = 0) -> Iterator[Stage]:
    """Names the work within; without a screen nothing is shown, and nothing is lost by it."""
    new = Stage(name, total, done)
    STAGES.append(new)
    try:
        yield new
    finally:
        STAGES.remove(new)  # not the last one, perhaps: a generator may end late
        if Screen.current is not None:
            Screen.current.has_started()


def shown_time(seconds: float) -> str:
    """Seconds, or minutes and hours with a colon.

    >>> shown_time(9.2), shown_time(75), shown_time(7260)
    ('9 s', '1:15 min', '2:01 h')
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    unit, large, small = ("min", whole // 60, whole % 60) if whole < 3600 else ("h", whole // 3600, whole // 60 % 60)
    return f"{large}:{small:02} {unit}"


class Screen:
    """Tells the stages on stderr while it is open.

    On a terminal they are one line at the bottom that changes four times a second; all else is written above it.
    Elsewhere, as in a log file, a new stage has a line once it has lasted half a second, and a long one a line every
    five seconds at first, then more rarely. A command that ends at once, as with a wrong setting, leaves no such line.
    """

    #: The open screen of this process; there is at most one.
    current: Screen | None = None

    def __init__(self) -> None:
        self.began = self.spoke = time.perf_counter()
        self.idle = "starting"  # stands where no stage is at work
        self.stream, self.lock, self.ended = sys.stderr, threading.RLock(), threading.Event()
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.drawn, self.midline, self.known = False, False, set[str]()
        self.replaced: dict[str, TextIO] = {}

    def __enter__(self) -> Screen:
        Screen.current = self
        for name in ("stderr", "stdout") if self.live else ():
            stream: TextIO = getattr(sys, name)
            if stream.isatty():
                self.replaced[name] = stream
                setattr(sys, name, AboveLine(stream, self))
        self.thread = threading.Thread(target=self.run, name="screen", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        for name, stream in self.replaced.items():
            setattr(sys, name, stream)
        with self.lock:
            self.erase()
        Screen.current = None

    def run(self) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more
            while not self.ended.wait(TICK):
                with self.lock:
                    if not (self.midline or self.ended.is_set()):
                        self.draw() if self.live else self.say()

    def has_started(self) -> None:
        """Says `working` between two stages, no longer `starting`."""
        if self.idle == "starting":
            self.idle = "working"
            self.known.add(self.idle)

    def line(self) -> str:
        told = ": ".join(str(each) for each in list(STAGES)) or self.idle
        return f"[{shown_time(time.perf_counter() - self.began):>4}] {told}"

    def draw(self) -> None:
        """Draws the line at the bottom anew, cut to the terminal's width."""
        width = os.get_terminal_size(self.stream.fileno()).columns
        self.stream.write(f"\r\x1b[2K{self.line()[: width - 1]}")
        self.stream.flush()
        self.drawn = True

    def erase(self) -> None:
        """Clears the line, so that something can be written in its place."""
        if self.drawn:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
            self.drawn = False

    def say(self) -> None:
        """Writes a line if there is something new to tell, or if it has been silent for long."""
        now = time.perf_counter()
        since = {each.name: each.began for each in list(STAGES)} or {self.idle: self.began}
        new = [name for name, began in since.items() if name not in self.known and now - began >= SETTLED]
        if new or now - self.spoke >= max(SILENCE - TICK, SHARE * (now - self.began)):
            self.known.update(since)  # also those that have just begun: the line names them
            self.stream.write(f"{self.line()}\n")
            self.stream.flush()
            self.spoke = now


class AboveLine:
    """A stream of the terminal whose text takes the place of a screen's line, which is then drawn below it."""

    def __init__(self, stream: TextIO, screen: Screen) -> None:
        self.stream, self.screen = stream, screen

    def write(self, text: str) -> int:
        with self.screen.lock:
            self.screen.erase()
            self.screen.midline = not text.endswith("\n") if text else self.screen.midline
            return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextmanager
def showing() -> Iterator[Screen]:
    """The open screen, or a new one."""
    if Screen.current is not None:
        yield Screen.current
    else:
        with Screen() as screen:
            yield screen


#: Methods of a stream that first write what it has buffered.
FLUSHING = ("close", "detach", "reconfigure", "seek", "tell", "truncate")


class LastingStream:
    """Standard output or error for as long as somebody reads it; then the work goes on, and the text is dropped.

    A closed pipe is such an end, and so is a full disk under the file that the output goes to.

    Args:
        above: the stream of text whose bytes go to this one, if they do; the error that ends one ends both.
    """

    def __init__(self, name: str, stream: IO[Any], above: LastingStream | None = None) -> None:
        self.name, self.stream, self.above = name, stream, above
        self.error: OSError | None = None  # the one that ended it

    def write(self, text: Any) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.drop(error)
            return len(text)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    @property
    def buffer(self) -> LastingStream:
        """The stream of bytes below, where there is one."""
        return LastingStream(self.name, self.stream.buffer, self)  # type: ignore[attr-defined]

    def drop(self, error: OSError) -> None:
        """Lets all that is still to be written, what Python has buffered included, go nowhere."""
        if self.above is not None:
            self.above.drop(error)
            return
        self.error = self.error or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        if name in FLUSHING:
            self.flush()
        return getattr(self.stream, name)


@contextmanager
def lasting_streams() -> Iterator[list[LastingStream]]:
    """Standard output and error as `LastingStream` within this context; closed ones are opened to nowhere.

    Otherwise the next file that is opened would take the place of standard error, and messages would be written to it.
    """
    for number in (0, 1, 2):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the least number that is free
    before = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    if before["stdin"] is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    found = []
    for name in ("stdout", "stderr"):
        stream = before[name] or open(os.devnull, "w")  # noqa: SIM115
        found.append(LastingStream(name, stream))
        setattr(sys, name, found[-1])
    try:
        yield found
    finally:
        for each in found:
            each.flush()
        for name, stream in before.items():
            setattr(sys, name, stream)
