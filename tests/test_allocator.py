"""The allocator: told once, by a training, and it keeps what it was told to keep."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import SHORT, call

from mlframework.backend import machine
from mlframework.cli import train

#: How many blocks of 16 MiB come from the system, one after the other, before and after.
PROBE = """
import ctypes
from mlframework.backend import machine
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
class State(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]
libc.mallinfo2.restype = State
def mapped():
    before = libc.mallinfo2().field3
    assert libc.malloc(16 * 2**20)
    return libc.mallinfo2().field3 - before
print(mapped(), machine.tune(), mapped())
"""


#: MB of RAM that a process has with much memory, without it, and after it was given back.
RELEASED = """
import torch
from mlframework.backend import machine
def resident():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
machine.tune()
blocks = [torch.ones(2**20) for _ in range(100)]  # 4 MB each
much = resident()
del blocks
kept = resident()
machine.give_back()
print(much - kept, kept - resident())
"""


@pytest.fixture
def told(monkeypatch):
    """What the C library is told."""
    calls: list[tuple[int, int]] = []
    libc = SimpleNamespace(
        gnu_get_libc_version=None, mallopt=lambda *call: calls.append(call) or 1, malloc_trim=lambda pad: 0
    )
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    monkeypatch.setattr(sys, "platform", "linux")
    forget()
    yield calls
    forget()


def forget():
    machine.tune.cache_clear()
    machine.glibc.cache_clear()


def test_it_is_told_once_by_a_training_that_asks_for_it(told, tmp_path):
    small = ["base_layer.hidden=[8]", "evaluation=none", *SHORT]
    assert call(train.main, *small, "run_dir=a", "allocator=system", folder=tmp_path).exit_code == 0
    assert not told
    for run in ("b", "c"):
        assert call(train.main, *small, f"run_dir={run}", folder=tmp_path).exit_code == 0
        assert told == list(machine.MALLOPT.items())


def test_a_resumed_run_may_change_it(told, tmp_path):
    small = ["base_layer.hidden=[8]", "evaluation=none", "schedule=constant", "run_dir=run"]
    assert call(train.main, *small, *SHORT, "allocator=system", folder=tmp_path).exit_code == 0
    more = ["resume=true", "run_dir=run", "trainer.steps=3"]
    assert call(train.main, *more, folder=tmp_path).exit_code == 0
    assert not told
    assert call(train.main, *more, "allocator=tuned", folder=tmp_path).exit_code == 0
    assert told


def test_elsewhere_nothing_is_told(told, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not machine.tune()
    machine.give_back()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=lambda name: SimpleNamespace()))  # as musl's
    forget()
    assert not machine.tune()
    assert not told


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 to look"
)
def test_a_large_block_comes_from_the_heap_afterwards():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True", "0"]


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="is glibc's")
def test_what_is_kept_can_be_given_back():
    done = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, text=True, check=True)
    freed, given_back = map(int, done.stdout.split())
    assert freed < 50 < 300 < given_back
