"""The fastest of several candidates is found by the clock."""

import functools
import time

import pytest

from mlframework.backend import machine
from mlframework.backend.machine import fastest, medians


def test_the_fastest_is_found():
    assert fastest({"slow": lambda: time.sleep(0.02), "quick": lambda: time.sleep(0.002)}) == "quick"


@pytest.mark.parametrize(("seconds", "expected"), [(1.04, "first"), (1.06, "second")])
def test_of_candidates_that_are_about_as_fast_the_first_is_taken(monkeypatch, seconds, expected):
    monkeypatch.setattr(machine, "medians", lambda candidates: {"first": seconds, "second": 1.0})
    assert fastest({"first": lambda: None, "second": lambda: None}) == expected


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, machine.MANY), (0.02, machine.CALLS)])
def test_candidates_take_turns_and_short_ones_more(monkeypatch, seconds, turns):
    calls = []
    monkeypatch.setattr(machine, "timed", lambda candidate: candidate() or seconds)
    medians({name: functools.partial(calls.append, name) for name in ("one", "other")})
    assert calls == ["one", "other"] * (1 + turns)


def test_the_first_call_of_a_candidate_does_not_count():
    new = [time.sleep]

    def settled():
        if new:
            new.pop()(1.1)

    assert fastest({"steady": lambda: time.sleep(0.02), "settled": settled}) == "settled"


def test_a_long_candidate_is_called_once(monkeypatch):
    monkeypatch.setattr(machine, "LONG", 0.01)
    calls = []
    fastest({"long": lambda: (calls.append(1), time.sleep(0.02))})
    assert len(calls) == 1
