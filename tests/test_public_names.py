"""The names by which users and configs reach classes: `mlframework.Name`, and `mlframework.<room>.Name`."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from inspect import isabstract
from pathlib import Path

import pytest
import yaml

import mlframework
from mlframework.evaluation import Baseline, Display, Measure
from mlframework.files import KeepsArguments
from mlframework.inner_loop import InnerUpdate

ROOT = Path(__file__).parents[1]
TARGET = re.compile(r"mlframework\.(\w+)\.([A-Z]\w+)")


def targets(node):
    """Each `_target_` in a config file, at any depth."""
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from targets(value)


TARGETS = [
    (str(path.relative_to(ROOT)), target)
    for path in sorted((ROOT / "conf").rglob("*.yaml"))
    for target in targets(yaml.safe_load(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("file", "target"), TARGETS)
def test_every_target_is_a_public_name_of_a_room(file, target):
    if not target.startswith("mlframework."):
        assert target.split(".")[0] in {"torch", "sklearn", "optuna"}
        return
    found = TARGET.fullmatch(target)
    assert found, f"{file}: must be mlframework.<room>.<Name>"
    room, name = found.groups()
    assert room in mlframework.ROOMS
    assert name in import_module(f"mlframework.{room}").__all__, f"add a line to mlframework/{room}/__init__.pyi"


def test_every_public_name_is_imported_from_the_package_and_from_its_room():
    for room in mlframework.ROOMS:
        package = import_module(f"mlframework.{room}")
        for name in package.__all__:
            assert getattr(mlframework, name) is getattr(package, name), f"{room}.{name}"
    for name in mlframework.__all__:
        getattr(mlframework, name)


#: What a config may name of a room.
PARTS = {"evaluation": (Baseline, Display, Measure)} | dict.fromkeys(
    ("base_layers", "inner_loop", "meta_layers", "regularisers", "tasks"), (InnerUpdate, KeepsArguments)
)


@pytest.mark.parametrize("room", PARTS)
def test_every_part_that_a_config_may_name_is_in_the_table_of_its_room(room):
    package = import_module(f"mlframework.{room}")
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = import_module(info.name)
        public = [] if info.ispkg else getattr(module, "__all__", [])
        classes = [kind for kind in (getattr(module, name) for name in public) if isinstance(kind, type)]
        parts = {kind.__name__ for kind in classes if issubclass(kind, PARTS[room]) and not isabstract(kind)}
        assert parts <= set(package.__all__), f"add a line to mlframework/{room}/__init__.pyi"


def test_no_two_rooms_have_one_public_name():
    names = Counter(name for room in mlframework.ROOMS for name in import_module(f"mlframework.{room}").__all__)
    assert not [name for name, count in names.items() if count > 1]
    assert not set(names) & set(mlframework.ROOMS)


def test_type_checkers_see_the_names_that_there_are():
    """The stub of the package states its rooms and its own names by hand."""
    stub = (ROOT / "mlframework" / "__init__.pyi").read_text(encoding="utf-8")
    assert set(re.findall(r"^from \.(\w+) import \*$", stub, re.MULTILINE)) == set(mlframework.ROOMS)
    own = set(mlframework.__all__).difference(*(import_module(f"mlframework.{r}").__all__ for r in mlframework.ROOMS))
    assert set(re.findall(r"\bas (\w+)", stub)) == own


def test_neither_the_package_nor_its_rooms_import_torch():
    code = "import sys, mlframework; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Sinus"):
        mlframework.Sinus  # noqa: B018
