"""The folder of a run: its settings, its environment and its results."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, ClassVar

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlframework.errors import InvalidValue, UserError
from mlframework.files import as_json, atomic, remove_parts, write_json, write_text

__all__ = ["PARTS", "RunFolder", "git_state", "locked_folder"]

#: The parts of a run's config.
PARTS = ("task", "base_layer", "algorithm", "optimizer", "schedule", "outer", "trainer", "logger")

#: Files that the process with the lock writes, in the folder and in `checkpoints/`.
FILES = ("config.yaml", "overrides.yaml", "choices.json", "environment.json", "resumed.json", "result.json")
CHECKPOINTS = ("last.pt", "best.safetensors")

#: Packages whose versions are recorded.
RECORDED = ("mlframework", "torch", "numpy", "scikit-learn", "hydra-core", "omegaconf", "tensorboard")


class RunFolder:
    """Paths and records of one run.

    Args:
        path: `config.yaml`, `overrides.yaml`, `choices.json`, `environment.json`, `checkpoints/`, `result.json` and
            TensorBoard's events lie here; `resumed.json` lists the changes of each resume.
        key: the setting that named the folder, for messages.
    """

    #: The folders that this process has held.
    held: ClassVar[set[Path]] = set()

    def __init__(self, path: Path | str, *, key: str = "run_dir") -> None:
        if not str(path).strip():
            raise InvalidValue(key, path, "must name a folder")
        self.path, self.key = Path(path), key
        self.last, self.best = (self.path / "checkpoints" / name for name in CHECKPOINTS)
        self.result = self.path / "result.json"  # written last
        self.failed = self.path / "failed.json"  # the error of a failed job of a sweep

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    def check_new(self) -> None:
        """Refuses a folder that holds a run, or files of a run's names, or that is no folder for one run."""
        if self.path.resolve() in (Path("/"), Path.home().resolve()):
            raise InvalidValue(self.key, self.path, "must name a folder of the run's own, as in runs/mine")
        if self.holds_run:
            why = "holds a run already: resume=true continues it, or name another folder"
            raise InvalidValue(self.key, self.path, why)
        others = [name for name in FILES if (self.path / name).exists()]
        if others and not (self.path / ".lock").exists():
            raise InvalidValue(self.key, self.path, f"holds {others[0]}, which no run has written: name another folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out until this one ends; removes files that an earlier one left half written."""
        with locked_folder(self.key, self.path, "another process is using this run folder"):
            self.held.add(self.path.resolve())
            self.failed.unlink(missing_ok=True)
            remove_parts(self.path, FILES)
            remove_parts(self.last.parent, CHECKPOINTS)
            yield

    def record(self, config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> None:
        """Writes the environment and the settings: versions, machine, and the state of git."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        environment = {
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": {name: installed(name) for name in RECORDED},
            "git": git_state(),
        }
        write_json(self.path / "environment.json", environment)
        self.record_settings(config, overrides, choices)

    def record_settings(self, config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> None:
        """Writes the resolved config, the overrides, and the options chosen of groups."""
        write_text(self.path / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
        write_json(self.path / "choices.json", dict(choices))
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def choices(self) -> dict[str, str]:
        """The option chosen of each config group."""
        return dict(read(self.path / "choices.json", dict, json.loads))

    def overrides(self) -> list[str]:
        return [str(override) for override in read(self.path / "overrides.yaml", list, yaml.safe_load)]

    def finished(self, overrides: Sequence[str]) -> bool:
        """Whether a run with the same overrides, those of later resumes included, has come to its end."""
        return self.result.exists() and self.read_result().get("overrides") == list(overrides)

    def read_result(self) -> dict[str, Any]:
        return dict(read(self.result, dict, json.loads))

    def config(self) -> DictConfig:
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UserError(f"{self.path}: not a run folder (it holds no config.yaml)")
        config: DictConfig = read(path, DictConfig, OmegaConf.create)
        for name in (*PARTS, "seed"):
            if config.get(name) is None:
                raise UserError(f"{path}: damaged (it holds no {name})")
        return config

    def add_evaluation(self, content: Mapping[str, Any]) -> Path:
        """Writes an evaluation to `evaluation.json` and to the next of `evaluations/1.json`, ..., which is returned."""
        (self.path / "evaluations").mkdir(parents=True, exist_ok=True)
        text = as_json(content, indent=2) + "\n"
        with atomic(self.path / "evaluation.json") as part:
            part.write_text(text, encoding="utf-8")
            for number in itertools.count(1):
                path = self.path / "evaluations" / f"{number}.json"
                with suppress(FileExistsError):
                    os.link(part, path)
                    break
        write_text(self.path / "evaluation.json", text)  # a file of its own: who edits it leaves the numbered one alone
        return path


def locked_folder(key: str, path: Path, taken: str) -> IO[str]:
    """The lock of a folder, which is made if need be; `key` is the setting that named it, `taken` the error."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise InvalidValue(key, path, f"cannot be made ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InvalidValue(key, path, taken) from None
    return lock


def read(path: Path, kind: type[Any], parse: Callable[[str], Any]) -> Any:
    """The content of a file of the run folder; an error if it is not of the expected kind."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if not isinstance(found, kind):
        raise UserError(f"{path}: damaged (it holds no {kind.__name__})")
    return found


def git_state() -> dict[str, Any]:
    """The commit of the working directory, None where it is no git checkout, and whether files differ from it."""
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git(*command: str) -> str | None:
    try:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
