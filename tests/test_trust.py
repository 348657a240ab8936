"""Hostile run folders, checkpoints, archives and caches: each is refused in one line, and nothing in it ran.

A payload that runs writes the canary. SECURITY.md lists these tests beside what they are about.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import SHORT, call
from omegaconf import OmegaConf
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file

import mlframework
from mlframework import keys
from mlframework.backend import graph_cache, inductor
from mlframework.base_layers import MLP, Timm, Torchvision
from mlframework.base_layers.checksums import to_safetensors, zip_matches
from mlframework.base_layers.weight_files import read_weights
from mlframework.cli import compare, evaluate, generate, train
from mlframework.errors import InvalidValue, UserError
from mlframework.meta_layers import Prototypes
from mlframework.runs.board import BoardRecord
from mlframework.runs.git_state import git_state
from mlframework.runs.resume import resumed
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.saved import class_named, save
from mlframework.runs.trusted import check_stored
from mlframework.tasks import Digits, Omniglot
from mlframework.tasks.data_folder import cached
from mlframework.tasks.images import omniglot
from mlframework.tasks.images.pixels import read_image
from mlframework.tasks.tables.read_table import read_table
from mlframework.tasks.text.text_data import read_packed_json
from mlframework.training.checkpoint import read_metadata
from mlframework.training.last_checkpoints import newest

ROOT = Path(__file__).parents[1]

#: A task in a file of the user's own.
OWN = "from mlframework.tasks import Sinusoid\nclass Waves(Sinusoid):\n    pass\n"

FEW = ("evaluation.tasks=2", "evaluation.validation_tasks=2", "evaluation/baseline=[]")


class Payload:
    """Its pickle writes the canary when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A file that no test may leave behind."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A run of a task of the user's own, in the folder of its file."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_tasks.py").write_text(OWN)
    typed = ("task._target_=my_tasks.Waves", "task.k_shot=2", "base_layer.hidden=[4]", "evaluation=none", "run_dir=run")
    said = call(train.main, *SHORT, *typed, folder=folder)
    assert said.exit_code == 0, said.err
    yield folder
    sys.modules.pop("my_tasks", None)


@pytest.fixture
def theirs(mine, tmp_path, monkeypatch):
    """Makes a stranger's run folder, signed by the stranger's key, whose config a function has changed."""

    def make(change=lambda config: None) -> Path:
        folder = tmp_path / "theirs"
        shutil.copytree(mine / "run", folder)
        found = RunFolder(folder)
        config, overrides, choices = OmegaConf.load(folder / "config.yaml"), found.overrides(), found.choices()
        config.task._target_ = "mlframework.tasks.Sinusoid"
        change(config)
        with monkeypatch.context() as patch:
            patch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "their_key"))
            found.record_settings(config, overrides[:0], choices)
        return folder

    return make


def refused(said, line: str) -> None:
    """A command has ended with exit code 2 and this one line."""
    assert line in said.err, said.err
    assert (said.exit_code, said.err.count("\n"), said.out) == (2, 1, "")


#: The commands that read a run folder.
DOORS = {
    "evaluate": lambda folder, here: call(evaluate.main, f"run={folder}", *FEW, folder=here),
    "generate": lambda folder, here: call(generate.main, f"run={folder}", "support=texts", folder=here),
    "resume": lambda folder, here: call(train.main, f"run_dir={folder}", "resume=true", folder=here),
    "compare": lambda folder, here: call(compare.main, f"run={folder}", folder=here),
    "ensemble": lambda folder, here: call(
        *(evaluate.main, "run=run", *FEW, "+evaluation.baseline.both._target_=mlframework.runs.Ensemble"),
        f"+evaluation.baseline.both.members=[{folder}]",
        folder=here,
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_stored_config_that_names_os_system_is_refused(door, mine, theirs, canary):
    def change(config):
        config.task = {"_target_": "os.system", "command": f"touch {canary}"}

    folder, here = theirs(change), mine
    (here / "texts").write_text("a\nb\n")
    refused(DOORS[door](folder, here), f"{folder / 'config.yaml'}: task._target_=os.system: is no part of a run")


def test_a_stored_config_that_names_subprocess_is_refused(theirs, tmp_path, canary):
    def change(config):
        config.base_layer = {"_target_": "subprocess.check_call", "args": ["touch", str(canary)]}

    said = DOORS["evaluate"](theirs(change), tmp_path)
    refused(said, "base_layer._target_=subprocess.check_call: is no part of a run")


@pytest.mark.parametrize("door", ["evaluate", "resume"])
def test_a_stored_config_that_names_a_file_of_the_current_folder_is_refused(door, theirs, tmp_path, canary):
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n{OWN}")
    folder = theirs(lambda config: config.task.update({"_target_": "evil.Waves"}))
    refused(DOORS[door](folder, tmp_path), "add trust=evil, or in Python load(..., classes=[Waves])")
    assert "evil" not in sys.modules


@pytest.mark.parametrize("where", ["list", "partial", "baseline", "deep"])
def test_a_stored_config_with_a_nested_target_is_refused(where, theirs, tmp_path, canary):
    payload = {"_target_": "os.system", "_args_": [f"touch {canary}"]}

    def change(config):
        if where == "list":
            config.base_layer.hidden = [payload]
        elif where == "partial":
            config.algorithm.update = {**payload, "_partial_": True, "_recursive_": False}
        elif where == "baseline":
            config.evaluation = {"baseline": {"one": payload}}
        else:
            config.task.amplitude = [[{"a": {"b": [payload]}}]]

    refused(DOORS["evaluate"](theirs(change), tmp_path), "_target_=os.system: is no part of a run")


@pytest.mark.parametrize(
    "name",
    [
        *("builtins.exec", "functools.partial", "pathlib.Path.write_text", "importlib.import_module", "__main__.x"),
        *("joblib.load", "torch.load", "torch.hub.load", "torch.nn.init.torch.load", "torch.optim.swa_utils.sys"),
        *("sklearn.pipeline.Pipeline", "sklearn.datasets.fetch_openml", "hydra.utils.instantiate", "timm.create_model"),
        *("mlframework.tasks.os.system", "mlframework.runs.save", "mlframework.runs.JoblibLauncher"),
        *("mlframework.files.write_text", "mlframework.tasks.download.download", "mlframework.tasks.Nothing"),
        *("", "os", "a b.c", "x\n.y", 3, None),
    ],
)
def test_a_stored_config_names_no_other_code(name, tmp_path):
    with pytest.raises(UserError) as caught:
        check_stored({"task": {"_target_": name}}, tmp_path / "config.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'config.yaml'}: task._target_=")


def test_a_stored_config_may_name_all_that_our_options_name(tmp_path):
    files = [path for path in (ROOT / "conf").rglob("*.yaml") if "hydra" not in path.parts]
    content = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
    parts = [{key: value for key, value in (each or {}).items() if key != "hydra"} for each in content]
    assert str(parts).count("_target_") > 120
    check_stored(without_interpolations(parts), tmp_path / "config.yaml")


def without_interpolations(node):
    """The same, as a run folder holds it."""
    if isinstance(node, dict):
        return {key: without_interpolations(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_interpolations(value) for value in node]
    return None if "${" in str(node) else node


@pytest.mark.parametrize(
    "value", ["${direction:query_loss,evil.Waves}", "${oc.env:HOME}", "${seed}", "${oc.decode:'x'}", "mlframework.${x}"]
)
def test_a_stored_config_with_an_interpolation_is_refused(value, theirs, tmp_path, canary, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = theirs()
    path = folder / "config.yaml"
    path.write_text(path.read_text() + f'suggested_too: {{_target_: "{value}"}}\n')
    with pytest.raises(UserError, match="refers to something else"):
        RunFolder(folder).config()


@pytest.mark.parametrize(
    "override",
    [
        "+note='${direction:query_loss,evil.Waves}'",
        r"+note=$\{direction\:query_loss\,evil.Waves\}",
        "task=../../evil",
        "+task@a.b=../../evil",
        "hydra.job.chdir=true",
    ],
)
def test_stored_overrides_that_read_other_files_or_values_are_refused(override, theirs, tmp_path, canary, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = theirs()
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create([override])))
    with pytest.raises(UserError, match=r"overrides\.yaml: .*: your key has not signed this run"):
        resumed(RunFolder(folder), ["trainer.log_every=3"])


# The user's own runs.


def test_ones_own_run_of_ones_own_task_needs_no_word(mine):
    said = DOORS["evaluate"]("run", mine)
    assert (said.exit_code, said.err) == (0, ""), said.err
    assert resumed(RunFolder(mine / "run"), ["trainer.log_every=3"]).config.trainer.log_every == 3


def test_a_run_of_ones_own_task_that_another_key_signed_needs_one(mine, tmp_path, monkeypatch):
    shutil.copytree(mine / "run", tmp_path / "run")
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "another_key"))
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"your key has not signed this config.* add trust=my_tasks"):
        run.config()
    monkeypatch.setenv("MLFRAMEWORK_TRUST", "my_layers,my_tasks")
    assert run.config().task._target_ == "my_tasks.Waves"


def test_trust_is_named_on_the_command_line(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "another_key"))
    refused(DOORS["evaluate"]("run", mine), "add trust=my_tasks")
    said = call(evaluate.main, "run=run", "trust=my_tasks", *FEW, folder=mine)
    assert (said.exit_code, said.err) == (0, ""), said.err
    refused(DOORS["evaluate"]("run", mine), "add trust=my_tasks")  # it is not remembered
    refused(call(evaluate.main, "run=run", "trust=os", folder=mine), "trust=os: must name a module of your own")


def test_trust_in_a_module_covers_what_it_defines_alone(theirs, tmp_path, canary):
    (tmp_path / "my_waves.py").write_text(f"import os\n{OWN}")

    def change(config):
        config.task = {"_target_": "my_waves.os.system", "command": f"touch {canary}"}

    said = call(evaluate.main, f"run={theirs(change)}", "trust=my_waves", *FEW, folder=tmp_path)
    refused(said, "my_waves.os.system: trust=my_waves does not cover what my_waves has imported from elsewhere")
    sys.modules.pop("my_waves", None)


def test_classes_are_trusted_in_python(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "another_key"))
    monkeypatch.syspath_prepend(str(mine))
    import my_tasks

    with pytest.raises(UserError, match=r"load\(\.\.\., classes=\[Waves\]\)"):
        mlframework.load(mine / "run", device="cpu")
    assert mlframework.load(mine / "run", device="cpu", classes=[my_tasks.Waves]).meta_layer


@pytest.fixture
def elsewhere(mine, tmp_path, monkeypatch):
    """A copy of the user's own run in a folder from which its module is not found."""
    shutil.copytree(mine / "run", tmp_path / "run")
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(mine)])
    return tmp_path


@pytest.mark.parametrize("asked", [[], ["task.k_shot=3"]])
def test_ones_own_run_in_another_folder_says_where_its_module_is(asked, mine, elsewhere, monkeypatch):
    path = os.pathsep.join(sys.path)
    said = call(evaluate.main, "run=run", *FEW, *asked, folder=elsewhere)
    refused(said, f"cannot be imported (No module named 'my_tasks'): it lies in {mine}: type PYTHONPATH={mine} mlf")
    assert os.pathsep.join(sys.path) in (path, f"{path}{os.pathsep}{elsewhere}")
    monkeypatch.syspath_prepend(str(mine))
    assert call(evaluate.main, "run=run", *FEW, folder=elsewhere).exit_code == 0


def test_trust_in_a_module_that_is_not_there_says_where_it_has_to_be(elsewhere, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(elsewhere / "another_key"))
    said = call(evaluate.main, "run=run", "trust=my_tasks", folder=elsewhere)
    refused(said, f"my_tasks.py must lie in the current folder ({elsewhere}) or in one of PYTHONPATH")


def test_an_edited_config_is_no_longer_ones_own(mine, tmp_path):
    shutil.copytree(mine / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="your key has not signed this config"):
        RunFolder(tmp_path / "run").config()


def test_a_signature_vouches_for_the_text_that_was_read_alone(mine):
    """Not for another text that stood in the file meanwhile, nor for a file beside it."""
    file, hostile = mine / "run" / "config.yaml", {"task": {"_target_": "my_tasks.Sinusoid"}}
    check_stored(hostile, file, file.read_text())
    for path, text in ((file, file.read_text() + " "), (file.with_name("record.json"), None)):
        with pytest.raises(UserError, match="your key has not signed this config"):
            check_stored(hostile, path, text)


@pytest.mark.parametrize("content", [None, "[" * 100_000, '{"modules": 1, "signature": "00"}', "{}"])
def test_a_damaged_signature_is_none(content, mine, tmp_path):
    shutil.copytree(mine / "run", tmp_path / "run")
    file = tmp_path / "run" / "signature.json"
    file.unlink()
    if content is None:
        os.mkfifo(file)  # who opens it waits for ever
    else:
        file.write_text(content)
    with pytest.raises(UserError, match="your key has not signed this config"):
        RunFolder(tmp_path / "run").config()


def test_ones_own_signature_does_not_cover_a_module_of_the_same_name_elsewhere(mine, tmp_path, canary, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(f"open({str(canary)!r}, 'w')\n{OWN}")
    monkeypatch.delitem(sys.modules, "my_tasks")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"my_tasks is .*my_tasks\.py here, and was .* when you signed this config"):
        RunFolder(mine / "run").config()


def test_a_key_that_others_can_read_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "folder" / "key"))
    signature = keys.sign("a", "b")
    assert stat.S_IMODE((tmp_path / "folder" / "key").stat().st_mode) == 0o600
    assert keys.is_signed(signature, "a", "b") and not keys.is_signed(signature, "ab", "")
    (tmp_path / "folder" / "key").chmod(0o640)
    assert keys.sign("a", "b") is None and not keys.is_signed(signature, "a", "b")
    assert "only you can read" in caplog.text


def test_without_a_place_for_a_key_nothing_is_signed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "file" / "key"))
    assert keys.sign("a") is None and not keys.is_signed(b"", "a")


# Weights, saved algorithms, records.


@pytest.mark.parametrize("file", ["last.pt", "best.safetensors"])
def test_a_pickle_in_place_of_weights_is_refused(file, theirs, tmp_path, canary):
    folder = theirs()
    path = folder / "checkpoints" / file
    for other in path.parent.glob("last.*.pt"):
        other.unlink()  # the checkpoint before would take its place
    torch.save({"meta_layer": Payload(canary)}, path)
    weights = "last" if file == "last.pt" else "best"
    said = call(evaluate.main, f"run={folder}", f"weights={weights}", *FEW, folder=tmp_path)
    refused(said, str(path))


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.ckpt", "weights.tar", "weights.safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_in_place_of_weights_of_another_program_is_refused(name, form, tmp_path, canary):
    if form == "plain":
        (tmp_path / name).write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save({"a": Payload(canary)}, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_bomb_in_place_of_weights_is_refused(checksum, tmp_path):
    """A small archive whose tensors take as much memory as somebody likes."""
    parts = dict.fromkeys(("optimizer", "scheduler", "generators", "progress"))
    torch.save({"meta_layer": {"w": torch.zeros(10**6)}, **parts}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as to:
        for name in archive.namelist():
            to.writestr(name, archive.read(name))
    content = packed.getvalue()
    packed.seek(0)
    assert len(torch.load(packed, weights_only=True)["meta_layer"]["w"]) == 10**6 > 50 * len(content)
    if checksum:
        right = b"sha256:" + hashlib.sha256(content[:-2]).hexdigest().encode()
        content = content[:-2] + len(right).to_bytes(2, "little") + right
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    assert zip_matches(path)
    for read in (newest, read_weights):
        with pytest.raises(UserError, match="unpacks to more bytes than it has"):
            read(path)


def test_a_pipe_in_place_of_a_checkpoint_or_a_lock_makes_nobody_wait(theirs, tmp_path):
    folder = RunFolder(theirs())
    (folder.path / ".lock").unlink()
    os.mkfifo(folder.path / ".lock")
    with folder.locked():
        assert folder.in_use
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"theirs: cannot be written to"), folder.locked():
        pass
    assert not (tmp_path / "elsewhere").exists()
    folder.last.unlink()
    os.mkfifo(folder.last)
    assert "last.pt: is a pipe or a device" in str(newest(folder.last).damaged[folder.last])


def test_a_network_s_own_way_to_load_weights_is_refused():
    for kind, option in ((Timm, "checkpoint_path"), (Timm, "pretrained_cfg"), (Torchvision, "weights_backbone")):
        with pytest.raises(InvalidValue, match=f"options={option}: would load weights by code of the package"):
            kind("resnet18", options={option: "file.pth"})


def test_a_saved_algorithm_that_names_other_code_is_refused(tmp_path, canary):
    task = Digits(n_way=2, k_shot=1, k_query=1)
    save(Prototypes(MLP(task.spec, hidden=[4]), task), tmp_path / "model")
    tensors, metadata = load_file(tmp_path / "model"), read_metadata(tmp_path / "model")
    name = "mlframework.meta_layers.Prototypes"
    assert name in str(metadata)
    for other in ("os.system", "evil.Waves", "subprocess.Popen", "mlframework.meta_layers.torch"):
        changed = {key: value.replace(name, other) for key, value in metadata.items()}
        (tmp_path / "model").write_bytes(to_safetensors(tensors, changed))  # with a right checksum
        with pytest.raises(UserError, match="is no class of mlframework or of an installed plug-in"):
            mlframework.load(tmp_path / "model", device="cpu")


def test_what_a_plug_in_has_imported_is_none_of_its_parts(tmp_path, monkeypatch):
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlframework.conf]\ntheirs = their_plug_in.conf\n")
    (tmp_path / "their_plug_in" / "conf").mkdir(parents=True)
    (tmp_path / "their_plug_in" / "__init__.py").write_text("")
    (tmp_path / "their_plug_in" / "parts.py").write_text(f"from subprocess import Popen\n{OWN}")
    (tmp_path / "their_plug_in" / "__main__.py").write_text("raise SystemExit('the payload ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert class_named("their_plug_in.parts.Waves").__name__ == "Waves"
    for name in ("their_plug_in.parts.Popen", "their_plug_in.parts.subprocess", "their_plug_in.__main__.x"):
        with pytest.raises(UserError, match="is no class of mlframework"):
            class_named(name)
        with pytest.raises(UserError):
            check_stored({"_target_": name}, tmp_path / "config.yaml")


def test_a_record_of_the_board_that_names_other_code_is_refused(tmp_path, canary):
    record = next(iter(sorted((ROOT / "results" / "board").glob("*.json"))))
    text = re.sub(r'"_target_": "[^"]+"', '"_target_": "os.system"', record.read_text(), count=1)
    (tmp_path / record.name).write_text(text)
    with pytest.raises(UserError, match=r"task_config.*_target_=os\.system: is no part of a run"):
        BoardRecord.read(tmp_path / record.name)


# Caches.


def test_a_pickle_in_place_of_a_graph_in_the_cache_is_not_loaded(tmp_path, canary, monkeypatch):
    import zlib

    file = tmp_path / "graphs" / "0.pickle.z"
    graph_cache.save({"a": 1}, file)
    whole = file.read_bytes()
    assert graph_cache.load(file) == {"a": 1}
    malicious = zlib.compress(pickle.dumps(Payload(canary)))
    for content in (malicious, whole[:32] + malicious, b"", whole[:20], whole[:-1], bytes(32) + whole[32:]):
        file.write_bytes(content)
        assert graph_cache.load(file) is None
    other = file.with_name("1.pickle.z")
    other.write_bytes(whole)
    assert graph_cache.load(other) is None, "the answer to another question"
    file.write_bytes(whole)
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "another_key"))
    assert graph_cache.load(file) is None, "another user's graph"


def test_a_pickle_in_place_of_arrays_in_the_cache_is_built_anew(tmp_path, canary, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))

    def arrays():
        return cached("thing", 0, lambda: {"x": np.arange(3)}, source=__file__)

    arrays()
    (path,) = tmp_path.glob("thing-*.npz")
    objects = io.BytesIO()
    np.savez(objects, x=np.array([Payload(canary)], dtype=object))
    for content in (objects.getvalue(), pickle.dumps(Payload(canary))):
        path.write_bytes(content + hashlib.sha256(content).digest())  # the checksum of a stranger is right
        assert arrays()["x"].tolist() == [0, 1, 2]


def test_compiled_code_lies_where_only_this_user_writes(tmp_path):
    made = inductor.folder_of_code(tmp_path)
    assert made.parent == tmp_path and stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o770)  # the group may have put code there
    assert inductor.folder_of_code(tmp_path).parent != tmp_path
    made.chmod(0o700)
    tmp_path.chmod(0o777)  # anybody could put another folder in its place
    assert inductor.folder_of_code(tmp_path).parent != tmp_path
    tmp_path.chmod(0o1777)  # as /tmp: nobody could
    assert inductor.folder_of_code(tmp_path) == made
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "link").symlink_to(tmp_path)  # anybody could put another link there, once we have looked
    assert inductor.folder_of_code(open_to_all / "link") == made


def test_the_folder_of_compiled_code_of_another_user_is_not_used(tmp_path, monkeypatch):
    made = inductor.folder_of_code(tmp_path)
    monkeypatch.setenv("MLFRAMEWORK_KEY", str(tmp_path / "another_key"))
    assert inductor.folder_of_code(tmp_path) != made


# Data.


def test_a_pickle_in_place_of_a_data_set_is_refused(tmp_path, canary, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "cache"))
    payload = pickle.dumps(Payload(canary))
    (tmp_path / "text").mkdir()
    for name in ("table.csv", "table.parquet", "table.pkl", "images_background.zip", "images_evaluation.zip", "0.png"):
        (tmp_path / name).write_bytes(payload)
    (tmp_path / "text" / "x.json.gz").write_bytes(gzip.compress(payload))
    for name in ("table.csv", "table.parquet", "table.pkl"):
        with pytest.raises(UserError):
            read_table(tmp_path / name)
    with pytest.raises(UserError, match="damaged"):
        Omniglot(n_way=2, k_shot=1, k_query=1, data_dir=tmp_path).sample(1, "train", torch.Generator())
    with pytest.raises(UserError, match="is no UTF-8 once it is unpacked"):
        read_packed_json(tmp_path, "x.json.gz", "", bool)
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(tmp_path / "0.png", (1, 8, 8))


def drawing(size: int = 8) -> bytes:
    Image.new("L", (size, size)).save(png := io.BytesIO(), "png")
    return png.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Makes a zip of two characters, and reads it; `members` come before its drawings or in their place."""
    monkeypatch.setattr(omniglot, "ZIPS", {"images_background.zip": (2, 1)})
    path = tmp_path / "images_background.zip"

    def read(members: dict[str, bytes]) -> None:
        drawings = {f"images_background/A/{c}/{n:02}.png": drawing() for c in "ab" for n in range(20)}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in (drawings | members).items():
                file.writestr(name, content)
        return omniglot.read_zips([path], 8)

    return read


def test_an_archive_writes_nothing_outside_its_folder(archive, tmp_path):
    before = set(tmp_path.parent.rglob("*"))
    found = archive({"../outside": b"x", "/tmp/outside": b"x", "images_background/../outside.png": b"x"})
    assert found["images"].shape == (2, 20, 8, 8)
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "images_background.zip"}
    with pytest.raises(UserError, match="holds 3 characters"):
        archive({"images_background/A/../outside.png": drawing()})
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("kind", ["declared", "more than declared", "pixels"])
def test_a_bomb_in_an_archive_is_refused(kind, archive, tmp_path, monkeypatch):
    first, path = "images_background/A/a/00.png", tmp_path / "images_background.zip"
    bomb = drawing(5000) if kind == "pixels" else bytes(10**7)
    if kind == "more than declared":

        def understated(self, name, content, write=zipfile.ZipFile.writestr):
            write(self, name, content)
            self.filelist[-1].file_size = min(self.filelist[-1].file_size, 200)

        monkeypatch.setattr(zipfile.ZipFile, "writestr", understated)
    with pytest.raises(UserError) as caught:
        archive({first: bomb})
    assert str(caught.value).startswith(f"{path}: damaged (")
    wanted = {"declared": "unpacks to 10000000 bytes", "more than declared": "00.png", "pixels": "5000 x 5000 pixels"}
    assert wanted[kind] in str(caught.value)


def huge(path: Path, side: int) -> None:
    """A small PNG that declares so many pixels."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [20_000, 10_000, 8193])
def test_an_image_of_too_many_pixels_is_refused(side, tmp_path):
    huge(tmp_path / "0.png", side)
    with pytest.raises(UserError, match=r"0\.png: cannot be read as an image \(.*pixels"):
        read_image(tmp_path / "0.png", (1, 8, 8))


def in_iptc(content: bytes) -> bytes:
    """A file of IPTC with an image of 8 x 8 within, of which Pillow finds out the format by itself."""
    fields = {(3, 60): b"\1\0", (3, 65): b"\1", (3, 20): b"\0\x08", (3, 30): b"\0\x08", (3, 120): b"\5"}
    parts = [*fields.items(), *(((8, 10), content[at : at + 30_000]) for at in range(0, len(content), 30_000))]
    return b"".join(bytes([0x1C, *tag, *divmod(len(part), 256)]) + part for tag, part in parts)


@pytest.mark.parametrize("pack", [bytes, in_iptc])
def test_a_program_in_place_of_an_image_is_refused(pack, tmp_path, canary, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("gs_binary", "gs_windows_binary"):
        monkeypatch.setattr(EpsImagePlugin, name, None)
    Image.new("L", (8, 8)).save(tmp_path / "0.eps")
    (tmp_path / "0.png").write_bytes(pack((tmp_path / "0.eps").read_bytes()))
    with pytest.raises(UserError, match=r"0\.png: cannot be read as an image"):
        read_image(tmp_path / "0.png", (1, 8, 8))
    assert not canary.exists()
    with Image.open(tmp_path / "0.png") as image, pytest.raises(OSError, match=r"."):
        image.load()
    assert canary.exists(), "without the check Ghostscript runs"
    canary.unlink()


# The folder in which a command is typed.


@pytest.mark.parametrize("setting", ["core.fsmonitor", "filter.a=b.clean", "submodule"])
def test_git_runs_no_program_that_a_checkout_names(setting, tmp_path, canary, monkeypatch):
    def git(*words: str, folder: Path = tmp_path) -> None:
        said = ("-c", "user.email=a@b", "-c", "user.name=a", "-c", "protocol.file.allow=always")
        subprocess.run(["git", *said, *words], cwd=folder, check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    assert git_state()["commit"] is None
    (tmp_path / "a").write_text("1")
    (tmp_path / ".gitattributes").write_text("a filter=a=b\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    assert git_state() == {"commit": git_state()["commit"], "changed": False}
    (tmp_path / "payload").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "payload").chmod(0o755)
    folder = tmp_path
    if setting == "submodule":
        git("submodule", "--quiet", "add", str(tmp_path), "within")
        folder, setting = tmp_path / "within", "core.fsmonitor"
    git("config", setting, str(tmp_path / "payload"), folder=folder)
    (folder / "a").write_text("2")
    found = git_state()
    assert len(found["commit"]) == 40 and found["changed"]
    assert not canary.exists()


# The source, and the table.


#: Calls that may run what they read.
RUNNING = re.compile(
    r"(pickle|dill|joblib|cloudpickle|marshal|shelve|torch|np|numpy|yaml)\.(loads?|open|unsafe_load|full_load|Unpickler)"
    r"|(pandas|pd)\.(read_pickle|eval)|eval|exec|__import__|torch\.(hub|jit|package)\.\w+|runpy\.\w+"
    r"|.*\.extractall|shutil\.unpack_archive|os\.(system|popen|exec\w+|spawn\w+)"
)


def test_the_package_unpickles_nothing_but_graphs_that_the_user_signed():
    for path in sorted((ROOT / "mlframework").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):  # by which a call would have a shorter name
                assert not [each for each in node.names if RUNNING.fullmatch(f"{node.module}.{each.name}")], path
            if isinstance(node, ast.Call) and RUNNING.fullmatch(name := ast.unparse(node.func)):
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                safe = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}.get(name)
                signed = (path.name, name) == ("graph_cache.py", "pickle.loads")
                assert signed or (safe is not None and words.get(safe[0]) == safe[1]), f"{path}:{node.lineno}: {name}"


def test_the_table_of_trust_names_these_tests_and_all_of_them():
    table = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    here = {name for name in globals() if name.startswith("test_")}
    elsewhere = {"test_every_flipped_bit_in_the_cache_is_noticed", "test_a_download_that_broke_off_goes_on"}
    elsewhere |= {"test_a_download_that_goes_wrong_leaves_nothing_and_says_what_else_to_do"}
    elsewhere |= {"test_what_is_no_plain_file_is_not_cut", "test_a_download_writes_nothing_behind_a_link"}
    elsewhere |= {"test_a_pipe_in_place_of_a_cache_file_is_not_waited_for"}
    others = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("tasks_data_folder", "event_file"))
    assert all(f"def {name}(" in others for name in elsewhere)
    about_the_table = {"test_the_table_of_trust_names_these_tests_and_all_of_them"}
    assert table == (here | elsewhere) - about_the_table
