"""The wheel holds what the checkout holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = (".py", ".pyi", ".yaml")


def test_every_room_is_packaged():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = [path.parent.relative_to(ROOT) for path in (ROOT / "mlframework").rglob("__init__.py")]
    assert sorted(named) == sorted(["mlframework.conf", *(".".join(room.parts) for room in rooms)])


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution" in built.stderr or "Could not find a version" in built.stderr:
        pytest.skip("the package index, which has the build's setuptools, cannot be reached")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "inside"), [("mlframework", "mlframework"), ("conf", "mlframework/conf")])
def test_every_source_and_every_option_is_in_the_wheel(wheel_names, folder, inside):
    there = [
        path.relative_to(ROOT / folder)
        for path in (ROOT / folder).rglob("*")
        if path.suffix in KINDS or path.name == "py.typed"
    ]
    assert there
    assert not [path for path in there if f"{inside}/{path.as_posix()}" not in wheel_names]


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(wheel_names):
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"mlframework"}
