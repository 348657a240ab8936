"""Settings: whatever a number is set to, a command builds its parts or refuses in one line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from mlframework.cli import generate, train
from mlframework.errors import InvalidValue
from mlframework.files import leaves
from mlframework.runs import build
from mlframework.runs.check_config import check_config, parts
from mlframework.runs.error_report import fault
from mlframework.runs.run import check_process, set_up
from mlframework.runs.run_folder import PARTS, RunFolder

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_is_as_before():
    """What `composed` sets for interpolations of Hydra's own config is gone after the test."""
    yield
    HydraConfig.instance().cfg = None


def composed(name: str, *overrides: str) -> DictConfig:
    """A command's config, as Hydra hands it over."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose(name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config.hydra
    return config


def built(config: DictConfig, folder: Path):
    """Checks a config of a training, and builds all that it names but the data."""
    check_config(config, settings=train.SETTINGS, required=PARTS)
    check_process(config)
    config.init = None  # of another run
    training, trainer = set_up(config, RunFolder(folder)), instantiate(config.trainer)
    build.build_displays(config, training.task)
    evaluation = build.build_evaluation(config)
    if evaluation is not None:
        evaluation.check(training.task)
    return training, trainer, evaluation


def refusal(config: DictConfig, folder: Path) -> str | None:
    """The line with which a training refuses a config as the user's fault; None where all is built."""
    try:
        built(config, folder)
    except Exception as error:
        found = fault(error, config)
        assert found.exit_code == 2, found.line
        assert "\n" not in found.line
        return found.line
    return None


CONFIGS = [
    (),
    (
        "task=digits",
        "algorithm=maml_plus_plus",
        "optimizer=sgd",
        "schedule=linear",
        "evaluation/baseline/on_features=[svc]",
    ),
    ("task=text_lists", "algorithm=imaml", "algorithm/update=adam"),
]


def resolved(*typed: str) -> DictConfig:
    """A config in which each number stands for itself: no key follows another."""
    config = OmegaConf.create(OmegaConf.to_container(composed("train", *typed), resolve=True))
    OmegaConf.set_struct(config, True)
    return config


def is_wrong(key: str, value: float | None) -> bool:
    """Whether every setting refuses a value: one that is not finite, a negative one, a count without end."""
    if value is None or (value == 1e15 and isinstance(value, float)):
        return False
    return not (key.endswith("seed") and value == 10**15)


@pytest.mark.parametrize("typed", CONFIGS, ids=" ".join)
def test_whatever_a_number_is_set_to_all_is_built_or_refused_in_one_line(tmp_path, typed):
    config = resolved(*typed)
    del config.suggested  # which the other keys follow
    plain = dict(leaves(cast(dict[Any, Any], OmegaConf.to_container(config))))
    numbers = [key for key, value in plain.items() if type(value) in (int, float)]
    assert len(numbers) > 20
    for key in numbers:
        for value in (math.nan, math.inf, -1, 10**15, 1e15, None):
            OmegaConf.update(config, key, value)
            line = refusal(config, tmp_path / "run")
            assert line is not None or not is_wrong(key, value), f"{key}={value}"
            assert line is None or key in line or key.rpartition(".")[0] in line, line
        OmegaConf.update(config, key, plain[key])
    assert refusal(config, tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "settings"), [("evaluate", {}), ("generate", generate.SETTINGS)])
def test_other_commands_take_no_number_that_is_not_finite_or_without_end(name, settings):
    config = composed(name, "run=runs/mine")
    plain = dict(leaves(cast(dict[Any, Any], OmegaConf.to_container(config))))
    numbers = [key for key, value in plain.items() if type(value) in (int, float)]
    assert len(numbers) >= 4
    for key in numbers:
        for value in (math.nan, math.inf, -math.inf, 10**15):
            OmegaConf.update(config, key, value)
            if is_wrong(key, value):
                with pytest.raises(InvalidValue, match=f"^{re.escape(key)}="):
                    check_config(config, settings=settings)
        OmegaConf.update(config, key, plain[key])


@pytest.mark.parametrize("typed", CONFIGS, ids=" ".join)
def test_a_part_that_is_null_is_refused_in_one_line_or_left_out(tmp_path, typed):
    config = resolved(*typed)
    for key, part in list(parts(config)):
        OmegaConf.update(config, key, None)
        optional = ("algorithm.step_weights", "algorithm.norm", "algorithm.inner_loss")
        left_out = key.startswith(("evaluation", "display.")) or key in optional
        assert refusal(config, tmp_path / "run") is not None or left_out, key
        OmegaConf.update(config, key, part)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_built_with_and_without_an_evaluation(tmp_path, experiment):
    for options, there in ((), True), (("evaluation=none",), False):
        *_, evaluation = built(composed("train", f"experiment={experiment}", *options), tmp_path / "run")
        assert (evaluation is not None) is there
    assert not (tmp_path / "run").exists()
