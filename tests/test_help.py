"""`--help` says what every key means, from the yamls' comments and the constructors' docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from mlframework.cli.help import commented, comments_in, family_of, meaning, meanings

CONF = Path(__file__).parents[1] / "conf"

#: Groups whose options name classes of this package or of torch.
GROUPS = (
    *("algorithm", "base_layer", "display", "evaluation", "logger", "optimizer", "outer"),
    *("regulariser", "schedule", "task", "trainer"),
)
OPTIONS = sorted(path for group in GROUPS for path in (CONF / group).rglob("*.yaml"))

#: Options without a comment of their own: scikit-learn's estimators and the grids over their settings.
OTHERS = ("classifier.", "regressor.", "grid", "on_features.", "gradient_boosting.", "kernel_ridge.")


def explanations(path: Path) -> dict[str, str]:
    """The comments of an option's keys, of the option that it extends, and of the keys that all trainings have."""
    text, found = path.read_text(encoding="utf-8"), {}
    for each in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(each, str) and (path.parent / f"{each}.yaml").is_file():
            found |= explanations(path.parent / f"{each}.yaml")
    shared = comments_in((CONF / "train.yaml").read_text(encoding="utf-8"))
    return {**shared, **found, **meanings(OmegaConf.create(text)), **comments_in(text)}


def keys(tree: dict[str, object], prefix: str = "") -> list[str]:
    found = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found += keys(value, f"{prefix}{name}.")
        elif not name.startswith("_") and name != "defaults":
            found.append(f"{prefix}{name}")
    return found


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: str(path.relative_to(CONF).with_suffix("")))
def test_every_key_of_every_option_is_explained(path):
    own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if path.parts[-2] == "on_features":
        return  # scikit-learn's own settings
    told = explanations(path)
    unexplained = [key for key in keys(own) if not told.get(key) and not any(part in key for part in OTHERS)]
    assert not unexplained


def test_a_comment_stands_behind_its_value_or_above_its_key():
    text = """
# @package _global_
# How long.
steps: 10
every: 5 # steps; "never": not at all
sizes: [1, 2] # of layers
name: "a # b"
# Rates that suit the task,
# unless others are typed.
suggested:
  lr: 1 # the rate
last: # all of it
  - 1
"""
    assert comments_in(text, "trainer") == {
        "trainer.steps": "How long.",
        "trainer.every": 'steps; "never": not at all',
        "trainer.sizes": "of layers",
        "trainer.suggested": "Rates that suit the task, unless others are typed.",
        "trainer.suggested.lr": "the rate",
        "trainer.last": "all of it",
    }


def test_a_key_without_a_comment_has_its_docstrings_first_sentence():
    assert meaning("mlframework.training.Trainer", "meta_batch") == "tasks per outer step"
    assert meaning("mlframework.meta_layers.CAVIA", "inner_steps") == "inner steps while meta-training"  # of MAML
    assert meaning("torch.optim.Adam", "lr") == "", "torch is not imported for it"


def test_a_class_of_the_users_own_explains_its_settings(tmp_path, monkeypatch):
    (tmp_path / "own_waves.py").write_text('class Waves:\n    """W.\n\n    Args:\n        k: of them. More.\n    """\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert meaning("own_waves.Waves", "k") == "of them"
    assert "own_waves" not in sys.modules


def test_the_page_is_the_config_with_comments_as_it_can_be_typed():
    config = OmegaConf.create({"seed": 3, "a": {"_target_": "x.Y", "_partial_": True, "sizes": [4, 4], "b": "${seed}"}})
    page = commented(config, [("", "seed: 0 # of all draws"), ("a", "sizes: [1] # of layers")])
    assert [" ".join(line.split()) for line in page.splitlines()] == [
        "seed: 3 # of all draws",
        "a:",
        "_target_: x.Y",
        "sizes: [4, 4] # of layers",
        "b: ${seed}",
    ]
    assert "b: 3" in commented(config, [], resolve=True)


def test_an_algorithm_belongs_to_the_family_of_its_class():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (CONF / "algorithm").glob("*.yaml")}
    texts |= {"mine": "_target_: my_algorithms.Mine", "mine_too": "defaults: [mine]"}
    families = {"anil": "gradient_descent", "prototypes_cosine": "neural_network", "svm_rbf": "svm"}
    assert {name: family_of(name, texts) for name in families} == families
    assert {family_of(name, texts) for name in ("mine", "mine_too")} == {""}
    assert all(family_of(name, texts) for name in texts if not name.startswith("mine"))
