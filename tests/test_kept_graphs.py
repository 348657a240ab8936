"""What has been compiled is found by the next process, unless anything has changed that it depends on."""

import logging
import os
import platform
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from mlframework.backend import capture as capture_module, regions
from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.capture import Capture, layout_of
from mlframework.backend.graph_cache import GraphCache, file_of, sources
from mlframework.base_layers import MLP
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import Sinusoid

#: Where another process finds this module.
TESTS = str(Path(__file__).parent)

pytestmark = pytest.mark.slow  # every test compiles with an empty cache


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Nothing is kept from before."""
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    return tmp_path / "graphs"


@pytest.fixture(params=["whole", "units"])
def way(request, monkeypatch):
    if request.param == "units":
        monkeypatch.setattr(capture_module, "MOST_OPERATIONS", 0)
    return request.param


@pytest.fixture
def no_tracing(monkeypatch):
    def refuse(*args):
        raise AssertionError("traced")

    return lambda: monkeypatch.setattr(regions, "traced", refuse)


def maml(lr=0.1, hidden=6, activation=nn.ReLU, steps=2):
    torch.manual_seed(0)
    task = Sinusoid(k_shot=3, k_query=3)
    base_layer = MLP(task.spec, hidden=[hidden])
    for name, module in list(base_layer.named_modules()):
        if isinstance(module, nn.ReLU):
            base_layer.set_submodule(name, activation())
    return MAML(base_layer, task, update=partial(SGD, lr=lr), meta_gradient=Exact(), inner_steps=steps)


def episode_of(layer, seed=0):
    return layer.task.sample(4, "train", torch.Generator().manual_seed(seed))


def said(caplog):
    """What somebody is warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def asked(layer):
    return file_of(layer, ("whole step", layout_of(episode_of(layer))))


@pytest.mark.parametrize("where", ["behind a link", "elsewhere on the path"])
def test_installed_packages_are_no_sources_wherever_they_lie(where, tmp_path, tmp_path_factory, monkeypatch):
    """The compiler imports hundreds of them: the digest of the first step of a process would be another one."""
    place = Path(np.__file__).parents[1]
    (tmp_path / "link").symlink_to(place if where == "behind a link" else tmp_path)
    linked = {**sysconfig.get_paths(), **dict.fromkeys(("purelib", "platlib"), str(tmp_path / "link"))}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: linked)
    if where == "behind a link":
        monkeypatch.setattr(sys, "path", [each for each in sys.path if "-packages" not in each])
    before = sources([])
    unread = next(path for path in sorted(place.glob("torch/*/*.py")) if str(path) not in str(sys.modules))
    module = ModuleType("imported_by_the_compiler")
    module.__file__ = str(unread)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert sources([]) == before
    own = tmp_path_factory.mktemp("own") / "mine.py"
    own.write_text("scale = 2")
    module.__file__ = str(own)
    assert sources([]) != before, "a module of the user's"


def test_what_is_kept_is_used_without_tracing(way, own_folder, no_tracing, caplog):
    first = Capture(maml(), "true")(episode_of(maml()))
    assert len(list(own_folder.iterdir())) == (1 if way == "whole" else 2)
    no_tracing()
    layer = maml()
    with caplog.at_level(logging.WARNING):
        again = Capture(layer, "true")(episode_of(layer))
    assert not said(caplog)
    torch.testing.assert_close(again.by_name, first.by_name, rtol=0, atol=0)
    with torch.no_grad():  # parameters are inputs
        for p in layer.parameters():
            p.add_(0.1)
    other = Capture(layer, "true")(episode_of(layer))
    torch.testing.assert_close(other.by_name, eager_gradients(layer, episode_of(layer)).by_name)


def test_another_process_finds_it_whatever_its_hashes():
    script = "from test_kept_graphs import *; print(asked(maml()).name)"
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": TESTS},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def first_capture(tmp_path):
    """What a process with an empty cache said and left among temporary files."""
    script = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from test_kept_graphs import *; Capture(maml(), 'true')(episode_of(maml()))"
    )
    cache, temporary = (tmp_path / name for name in ("cache", "temporary"))
    temporary.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    env |= {"MLFRAMEWORK_CACHE": str(cache), "TMPDIR": str(temporary), "PYTHONPATH": TESTS}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return done.stderr, [path for path in temporary.rglob("*") if path.is_file()]


@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere the compiler keeps files of its own")
def test_a_first_capture_precompiles_no_headers(tmp_path):
    said, left = first_capture(tmp_path)
    assert "compiled in" in said and not left


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.2}, {"hidden": 7}, {"activation": nn.Tanh}, {"steps": 3}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_an_algorithm_depends_on_makes_another_question(change):
    assert asked(maml(**change)) != asked(maml())


def test_what_a_step_is_given_or_what_changes_as_it_trains_makes_none():
    layer = maml()
    before = asked(layer)
    layer.outer_step = 7
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
            p.grad = torch.ones_like(p)
    assert asked(layer) == before


class Own(SGD):
    scale = 1


def test_values_that_classes_and_modules_hold_count(monkeypatch):
    layer = maml()
    layer.update = Own({}, lr=0.1)
    before = asked(layer)
    monkeypatch.setattr(Own, "scale", 2)
    other = asked(layer)
    assert other != before
    monkeypatch.setattr(sys.modules[__name__], "A_NUMBER", 2)
    assert asked(layer) not in (before, other)


A_NUMBER = 1


def test_small_arrays_count_with_their_numbers_and_data_with_their_shape():
    layer = maml()
    found = []
    for kind in (torch.zeros, np.zeros):
        for size in (3, 2**20 + 1):
            layer.task.data = kind(size)
            found.append(asked(layer))
            layer.task.data[0] = 1
            found.append(asked(layer))
    assert [one == two for one, two in zip(found[::2], found[1::2], strict=True)] == [False, True, False, True]


def test_another_line_in_a_file_of_the_users_own_is_another_question(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "of_ones_own.py"
    file.write_text("from mlframework.inner_loop import SGD\nclass Own(SGD):\n    pass\n")
    import of_ones_own

    layer = maml()
    layer.update = of_ones_own.Own({}, lr=0.1)
    before = asked(layer)
    file.write_text("from mlframework.inner_loop import SGD\nclass Own(SGD):\n    twice = True\n")
    assert asked(layer) != before
    monkeypatch.delitem(sys.modules, "of_ones_own")


def test_a_graph_of_something_else_is_found_out_and_made_anew(way, own_folder, caplog):
    layer = maml(lr=0.2)
    expected = eager_gradients(layer, episode_of(layer)).by_name
    Capture(layer, "true")(episode_of(layer))
    files = sorted(own_folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    other = maml(lr=0.1)
    Capture(other, "true")(episode_of(other))
    wrong = sorted(set(own_folder.iterdir()) - set(files), key=lambda file: file.stat().st_mtime_ns)
    for mine, theirs in zip(files, wrong, strict=True):
        mine.write_bytes(theirs.read_bytes())
    with caplog.at_level(logging.WARNING):
        found = Capture(layer, "true")(episode_of(layer))
    assert not said(caplog)
    torch.testing.assert_close(found.by_name, expected, rtol=1e-4, atol=1e-4)
    assert {file.read_bytes() for file in files} - {file.read_bytes() for file in wrong}


def test_a_damaged_file_is_made_anew(own_folder):
    layer = maml()
    Capture(layer, "true")(episode_of(layer))
    (file,) = own_folder.iterdir()
    for content in (b"", b"not a graph"):
        file.write_bytes(content)
        found = Capture(layer, "true")(episode_of(layer))
        torch.testing.assert_close(found.by_name, eager_gradients(layer, episode_of(layer)).by_name)
        assert len(file.read_bytes()) > len(content)


def test_what_the_check_refuses_is_not_kept(own_folder, monkeypatch, caplog):
    layer = maml()
    monkeypatch.setattr(capture_module, "compile_step", twice)
    Capture(layer, "true")(episode_of(layer))
    assert "off the eager ones" in caplog.text
    assert not own_folder.exists()


def twice(layer, episode, step):
    """In place of a compiled step one whose gradients are wrong."""
    found = eager_gradients(layer, episode)
    return lambda *tensors: found._replace(by_name={name: 2 * grad for name, grad in found.by_name.items()})


def test_what_was_refused_is_not_read_again(own_folder):
    layer, kept = maml(), GraphCache()
    with kept.checked():
        kept.get(lambda: "first", layer, "anything")
    kept.checking = True
    assert kept.get(lambda: "second", layer, "anything") == "first"
    assert kept.forget()
    assert kept.get(lambda: "second", layer, "anything") == "second"
    assert not kept.forget()


def test_what_nobody_has_found_for_long_is_removed(own_folder):
    kept = GraphCache()
    with kept.checked():
        kept.get(lambda: 1, maml(), "old")
        kept.get(lambda: 2, maml(), "new")
    old, new = (file_of(maml(), (name,)) for name in ("old", "new"))
    os.utime(old, (0, 0))
    with kept.checked():
        kept.get(lambda: 3, maml(), "another")
    assert not old.exists() and new.exists()


def test_what_cannot_be_written_down_is_built_in_every_process(own_folder):
    layer, kept, built = maml(), GraphCache(), []
    layer.something = lambda x: x
    with kept.checked():
        for _ in range(2):
            kept.get(lambda: built.append(1), layer, "anything")
    assert built == [1, 1]
    assert not own_folder.exists()


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "file" / "folder"))
    kept, built = GraphCache(), []
    with kept.checked():
        kept.get(lambda: built.append(1), maml(), "anything")
    assert built == [1]
