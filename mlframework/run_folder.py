"""The folder of a run: what it was asked for, on what it ran, what came of it."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mlframework.errors import UserError
from mlframework.files import atomic, write_json

__all__ = ["RunFolder"]

RECORDED = ("mlframework", "torch", "numpy", "scikit-learn", "hydra-core", "omegaconf", "tensorboard")


class RunFolder:
    """Paths and records of one run.

    Args:
        path: `config.yaml`, `overrides.yaml`, `choices.json`, `environment.json`, `checkpoints/`, `result.json` and
            TensorBoard's events lie here.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def last(self) -> Path:
        """The state of the training at the last checkpoint."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The weights of the best validation."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def result(self) -> Path:
        """What came of the run; written last."""
        return self.path / "result.json"

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out for as long as this one lives, however it ends; clears what a killed one left."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={self.path}: cannot be made ({error.strerror})") from error
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"run_dir={self.path}: another process is using this run folder") from None
            for part in self.path.rglob("*.part"):
                part.unlink()
            yield

    def record(self, config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> None:
        """Writes the resolved config, the overrides, the options chosen of groups, versions and the state of git."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self.write_json(self.path / "environment.json", environment())
        write_text(self.path / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
        self.write_json(self.path / "choices.json", dict(choices))
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def choices(self) -> dict[str, str]:
        """The option chosen of each config group."""
        found: dict[str, str] = json.loads((self.path / "choices.json").read_text())
        return found

    def overrides(self) -> list[str]:
        """What the user typed when the run was started."""
        return [str(override) for override in OmegaConf.load(self.path / "overrides.yaml")]

    def finished(self, overrides: Sequence[str]) -> bool:
        """Whether a run that was started with the same overrides has come to its end."""
        return self.result.exists() and self.overrides() == list(overrides)

    def read_result(self) -> dict[str, Any]:
        """What came of the run."""
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found

    def config(self) -> DictConfig:
        """The resolved config of the run."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UserError(f"{self.path}: not a run folder (it holds no config.yaml)")
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        return config

    def write_json(self, path: Path, content: Any) -> None:
        """Writes JSON, atomically, with `null` for a number that is not finite."""
        write_json(path, content)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions, machine, and the commit of the working directory if it is a git checkout."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed(name) for name in RECORDED},
        "git": {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git(*command: str) -> str | None:
    """What git prints, or None where there is no git or no checkout."""
    try:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
