"""Settings: whatever a number is set to, a command builds its parts or refuses in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from mlframework import build
from mlframework.check_config import check_config
from mlframework.commands import train
from mlframework.run import set_up
from mlframework.run_folder import PARTS, RunFolder

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
    config.init = None  # of another run
    training = set_up(config, RunFolder(folder))
    return training, build.build_trainer(config), build.build_evaluation(config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_built_with_and_without_an_evaluation(tmp_path, experiment):
    for options, there in ((), True), (("evaluation=none",), False):
        *_, evaluation = built(composed("train", f"experiment={experiment}", *options), tmp_path / "run")
        assert (evaluation is not None) is there
    assert not (tmp_path / "run").exists()
