"""docs/meta_gradient_descent.md: its table has every member, and its commands build what they say."""

import inspect
import re

import pytest
import reference
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from test_contracts import presets
from test_docs import DOCS, FENCE

from mlframework.meta_layers.gradient_descent.cavia import FiLM
from mlframework.meta_layers.gradient_descent.imaml import Implicit
from mlframework.runs import build
from mlframework.runs.check_config import check_config

PAGE = (DOCS / "meta_gradient_descent.md").read_text(encoding="utf-8")


def composed(*overrides):
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        return compose("train", list(overrides))


def commands():
    blocks = [text for language, _, text in FENCE.findall(PAGE) if language == "bash"]
    return [line.partition(" #")[0] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_page_builds_a_meta_layer(command):
    program, *overrides = command.split()
    assert program == "mlframework-train"
    config = composed(*overrides)
    check_config(config, settings={})
    meta_layer = build.build_meta_layer(config, build.build_task(config))
    if "algorithm=imaml" in overrides:
        assert isinstance(meta_layer.meta_gradient, Implicit) and meta_layer.update.strength == 4.0
    if "algorithm=cavia_film" in overrides:
        assert isinstance(meta_layer.base_layer.features[2][1][1], FiLM)


def test_the_page_opens_with_the_reference_that_the_tests_compare_with():
    (code,) = (text for language, name, text in FENCE.findall(PAGE) if language == "python")
    assert code == inspect.getsource(reference.maml)


def test_every_member_of_the_family_is_on_the_page():
    members = [
        name
        for name in presets("algorithm")
        if ".gradient_descent." in get_class(composed(f"algorithm={name}").algorithm._target_).__module__
    ]
    assert len(members) > 10
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert set(members) <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}
