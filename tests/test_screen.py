"""The screen: what a command is doing stands there, on a terminal and in a log file."""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SHORT, call

from mlframework.cli import train
from mlframework.screen import SILENCE, STAGES, LastingStream, Screen, Stage, showing, stage

#: A line about a stage: the time since the start, then the stages.
LINE = re.compile(r"^\[ *[0-9:]+ (?:s|min|h)\] (.*)$", re.MULTILINE)


def test_a_log_file_has_a_line_for_each_stage_that_lasts(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Screen() as screen:
        screen.idle = "resting"
        with stage("validating"), stage("tasks", 100) as at:
            at.done = 37
            at.note = "query loss 0.5"
            time.sleep(1.2)
        for name in ("validating", "too short"):
            with stage(name):
                time.sleep(0.1)
    assert LINE.findall(sys.stderr.getvalue()) == ["validating: tasks 37/100, query loss 0.5"]
    assert not STAGES


def test_a_long_stage_is_told_again(monkeypatch):
    monkeypatch.setattr("mlframework.screen.SILENCE", 1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    began = time.monotonic()
    with Screen(), stage("compiling"):
        while len(LINE.findall(sys.stderr.getvalue())) < 2 and time.monotonic() < began + 60:
            time.sleep(0.1)
    assert 2 <= len(LINE.findall(sys.stderr.getvalue())) <= 1 + time.monotonic() - began
    assert SILENCE == 5, "never stands still for more than five seconds"


def test_no_line_is_told_twice(monkeypatch):
    """Each of three times half a second passed, and each time the line was the same."""
    monkeypatch.setattr("mlframework.screen.SETTLED", 0.1)
    monkeypatch.setattr("mlframework.screen.TICK", 0.02)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Screen():
        time.sleep(0.06)
        with stage("outer"):
            time.sleep(0.06)
            with stage("inner"):
                time.sleep(0.4)
    lines = LINE.findall(sys.stderr.getvalue())
    assert "outer: inner" in lines
    assert len(lines) == len({*lines}), lines


def test_matplotlib_says_nothing_of_its_fonts(tmp_path):
    call(train.main, "task.k_shot=0", folder=tmp_path)
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)
    assert logging.getLogger("mlframework").isEnabledFor(logging.INFO)


def test_after_a_stage_a_command_is_no_longer_starting(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Screen() as screen:
        assert screen.line().endswith("starting")
        with stage("evaluating"):
            pass
        assert screen.line().endswith("working")


def test_a_command_that_ends_at_once_says_nothing_of_stages(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Screen(), stage("checking"):
        print("task.k_shot=0: must be at least 1", file=sys.stderr)
    assert sys.stderr.getvalue() == "task.k_shot=0: must be at least 1\n"


def test_there_is_one_screen():
    with showing() as outer, showing() as inner:
        assert outer is inner
    assert Screen.current is None


def test_the_time_left_follows_from_the_pace_of_this_process():
    at = Stage("meta-training", 1000, 400)
    at.began, at.done = at.began - 10, 500
    assert str(at) == "meta-training 500/1000, 50 s left"


CHILD = """
import sys, time
from mlframework.screen import Screen, stage
with Screen(), stage("meta-training", 10) as at:
    for step in range(4):
        at.done += 1
        time.sleep(0.3)
    sys.stdout.writelines(["a ", "list\\n"])
    print("step 4: validation query_loss 0.5", file=sys.stderr)
    print("a table")
    print("no end of line", end="")
    time.sleep(0.6)
    print()
print("the end")
"""


def on_terminal(*command: str, **settings: object) -> str:
    """What a command writes to a terminal of 60 columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, **settings)  # type: ignore[call-overload]
    os.close(theirs)
    content = b""
    try:
        while chunk := os.read(ours, 4096):
            content += chunk
    except OSError:  # Linux's end of a terminal
        pass
    os.close(ours)
    assert process.wait(30) == 0
    return content.decode()


def seen(content: str) -> list[str]:
    """The lines that stay on a terminal: each `\\r` and erasing of a line carried out."""
    lines = [""]
    for piece in re.split(r"(\r\n|\r|\x1b\[2K|\n)", content):
        if piece in ("\r\n", "\n"):
            lines.append("")
        elif piece == "\x1b[2K":
            lines[-1] = ""
        elif piece != "\r":
            lines[-1] += piece
    return [line for line in lines if line]


def test_a_terminal_has_one_line_that_changes_and_goes_in_the_end():
    content = on_terminal(sys.executable, "-c", CHILD, env={**os.environ, "TERM": "xterm"})
    counts = [int(count) for count in re.findall(r"meta-training (\d+)/10", content)]
    assert counts == sorted(counts) and counts[-1] == 4 and len(set(counts)) > 2
    assert seen(content) == ["a list", "step 4: validation query_loss 0.5", "a table", "no end of line", "the end"]


#: Ways to write to a stream of text that is not full yet.
WAYS = {
    "write": lambda stream: stream.write("line\n"),
    "print": lambda stream: print("line", file=stream, flush=True),
    "writelines": lambda stream: stream.writelines(["one\n", "two\n"]),
    "bytes": lambda stream: stream.buffer.write(b"line\n"),
    "lines of bytes": lambda stream: stream.buffer.writelines([b"one\n", b"two\n"]),
    "bytes, flushed": lambda stream: (stream.buffer.write(b"line\n"), stream.buffer.flush()),
    "more bytes than are buffered": lambda stream: stream.buffer.write(b"line\n" * 10_000),
    "close": lambda stream: (stream.write("line\n"), stream.close()),
    "reconfigure": lambda stream: (stream.write("line\n"), stream.reconfigure(line_buffering=True)),
    "detach": lambda stream: (stream.write("line\n"), stream.detach().close()),
    "seek": lambda stream: (stream.write("line\n"), stream.seek(0)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("buffering", [1, -1], ids=["by lines", "in blocks"])
def test_whatever_is_written_to_a_full_disk_is_dropped_and_told(way, buffering):
    lasting = LastingStream("stdout", open("/dev/full", "w", buffering=buffering))  # noqa: SIM115
    WAYS[way](lasting)
    if way not in ("close", "detach"):
        lasting.close()
    assert lasting.error is not None and lasting.error.errno == errno.ENOSPC


def test_bytes_and_texts_come_in_order(tmp_path):
    with (tmp_path / "out").open("w") as file:
        lasting = LastingStream("stdout", file)
        lasting.writelines(["one\n", "two\n"])
        lasting.flush()
        lasting.buffer.writelines([b"three\n"])
        lasting.buffer.flush()
        lasting.write("four\n")
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\nfour\n" and lasting.error is None


def test_a_run_names_its_folder_and_the_next_command(tmp_path):
    said = call(train.main, *SHORT, "evaluation=none", "run_dir=run", folder=tmp_path)
    assert said.exit_code == 0
    assert f"run folder run: {' '.join(SHORT)} evaluation=none run_dir=run\n" in said.err
    assert "next: mlframework-evaluate run=run, or tensorboard --logdir run\n" in said.err


@pytest.mark.slow
def test_a_training_and_its_evaluation_never_stand_still(tmp_path):
    script = Path(sys.executable).with_name("mlframework-train")
    typed = ["trainer.steps=200", "trainer.validate_every=100", "evaluation.tasks=20", "run_dir=run"]
    times, lines = [time.monotonic()], []
    with subprocess.Popen(
        [script, *typed], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            times.append(time.monotonic())
            lines.append(line)
    times.append(time.monotonic())
    assert process.returncode == 0
    # Far more than is promised, for machines that do other things as well; a quick one passes a stage without a line.
    assert times[1] - times[0] < 15
    assert max(after - before for before, after in itertools.pairwise(times)) < SILENCE + 15
    assert LINE.findall("".join(lines))
