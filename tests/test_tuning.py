"""What is fastest is measured once, remembered by later processes, and found again where the memory is damaged."""

import json
import time

import pytest

from mlframework.backend import stopwatch as tuning
from mlframework.backend.stopwatch import fastest, known


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "KNOWN", {})
    return tmp_path


WAYS = {"slow": lambda: time.sleep(0.02), "quick": lambda: time.sleep(0.002)}


def forget(monkeypatch):
    """As a new process."""
    monkeypatch.setattr(tuning, "KNOWN", {})


def test_the_fastest_is_found_and_remembered_by_later_processes(monkeypatch, empty_cache):
    assert known("which") is None
    assert fastest("which", WAYS) == "quick"
    forget(monkeypatch)
    assert known("which") == "quick"
    (file,) = (empty_cache / "fastest").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "fastest": "slow"}))
    forget(monkeypatch)
    assert fastest("which", WAYS) == "slow"


def test_of_processes_that_measure_at_once_the_first_answers_for_all(monkeypatch, empty_cache):
    def other_process():
        """Another process measures and keeps its answer, while this one still measures."""
        if not (empty_cache / "fastest").exists():
            monkeypatch.setattr(tuning, "KNOWN", {})
            assert fastest("which", {"slow": lambda: None, "quick": lambda: time.sleep(0.02)}) == "slow"
            monkeypatch.setattr(tuning, "KNOWN", {})

    assert fastest("which", {"slow": lambda: time.sleep(0.02), "quick": other_process}) == "slow"


def test_of_ways_that_are_about_as_fast_the_first_is_taken():
    alike = {name: lambda: time.sleep(0.02) for name in ("first", "second")}
    assert fastest("which", alike) == "first"


def test_a_way_that_is_no_longer_there_is_measured_anew(monkeypatch):
    fastest("which", {"gone": lambda: None})
    assert fastest("which", WAYS) == "quick"


@pytest.mark.parametrize("text", ["{", "[]", "", "{}", '{"fastest": 3}'])
def test_a_damaged_cache_is_written_anew(monkeypatch, empty_cache, text):
    fastest("which", WAYS)
    (file,) = (empty_cache / "fastest").iterdir()
    file.write_text(text)
    forget(monkeypatch)
    assert fastest("which", WAYS) == "quick"
    assert json.loads(file.read_text())["fastest"] == "quick"


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, tuning.MANY), (2 * tuning.BRIEF / tuning.CALLS, tuning.CALLS)])
def test_ways_take_turns_and_short_ones_more(seconds, turns):
    calls = []
    fastest("which", {name: lambda name=name: (calls.append(name), time.sleep(seconds)) for name in ("one", "other")})
    assert calls == ["one", "other"] * (1 + turns)


def test_what_a_way_calls_for_the_first_time_is_not_its_own_time():
    """As a step, whose convolutions are measured when they are first met."""
    new = [time.sleep]

    def settled():
        if new:
            new.pop()(1.1)

    assert fastest("which", {"steady": lambda: time.sleep(0.02), "settled": settled}) == "settled"


def test_a_long_way_is_run_once(monkeypatch):
    monkeypatch.setattr(tuning, "LONG", 0.01)
    calls = []
    fastest("which", {"long": lambda: (calls.append(1), time.sleep(0.02))})
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "file" / "folder"))
    assert fastest("which", WAYS) == "quick"
    assert "cannot be written" in caplog.text
