"""The identity of a job, and the name of its folder."""

from __future__ import annotations

import re

import pytest

from mlframework.runs.overrides import identity, job_name, override_values

TYPED = ["algorithm=maml", "task=sinusoid", "optimizer.lr=0.001", "seed=2"]


@pytest.mark.parametrize(
    "other",
    [
        TYPED[::-1],
        [*TYPED, "launcher=joblib"],
        [*TYPED, "sweep=optuna", "resume=true"],
        ["algorithm=maml", "task=sinusoid", "optimizer.lr=1e-3", "seed=2"],
        ["algorithm='maml'", "task=sinusoid", "+optimizer.lr=0.001", "seed=2"],
    ],
    ids=str,
)
def test_the_same_settings_are_the_same_job_however_they_are_typed(other):
    assert identity(other) == identity(TYPED)
    assert job_name(other) == job_name(TYPED)


@pytest.mark.parametrize(
    "other",
    [
        TYPED[:-1],
        [*TYPED[:-1], "seed=3"],
        [*TYPED, "threads=1"],
        [*TYPED, "~display"],
        [*TYPED, "display=null"],
        [*TYPED, "trainer.steps=20"],
        [*TYPED[:-1], "seed='2'"],
    ],
    ids=str,
)
def test_other_settings_are_another_job(other):
    assert identity(other) != identity(TYPED)
    assert job_name(other) != job_name(TYPED)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (TYPED, "maml-sinusoid-lr0.001-seed2"),
        (["seed=0", "task=glyphs", "experiment=quick"], "quick-glyphs-seed0"),
        (["algorithm/update=adam", "algorithm.update.lr=0.0123456", "threads=1"], "lr0.01235-update_adam"),
        (["base_layer.hidden=[40,40]", "trainer.steps=500", "trainer.log_every=5"], "hidden40x40-steps500"),
        (
            ["task.path=/data/My Images", "+note='a/b\\\\c:d*e?'", "init=null"],
            "init_null-note_a_b_c_d_e-path_data_My_Images",
        ),
        (["~evaluation", "~regulariser.mixup"], "no_mixup"),
        (["threads=1", "evaluation.tasks=5"], "job"),
    ],
    ids=str,
)
def test_a_name_says_what_was_asked_for(typed, name):
    assert job_name(typed) == f"{name}-{identity(typed)}"


@pytest.mark.parametrize(
    "typed",
    [
        ["task.path='" + "x" * 500 + "'"],
        [f"a.key_number_{number}=0.123456789" for number in range(50)],
        [f"a.{letter * 30}={letter * 30}" for letter in "abcdef"],
        ["task.path='../../etc'"],
        ["task.name='CON'", "+x='a\tb'"],
        ["+note='ä ö ü 語'"],
        ["no override", "=", "[1"],
    ],
    ids=lambda typed: typed[0][:20],
)
def test_every_file_system_takes_the_name(typed):
    name = job_name(typed)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{8}", name)
    assert len(name) <= 80


def test_settings_are_read_as_hydra_reads_them():
    typed = ["a=[1, 2.0, 'x']", "b={c: true}", "d=null", "e='1'", "f=a\\:b"]
    assert override_values(typed) == {"a": [1, 2.0, "x"], "b": {"c": True}, "d": None, "e": "1", "f": "a:b"}
