"""The folder of a run: its settings, its environment and its results."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import platform
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlframework.errors import InvalidValue, UserError
from mlframework.files import as_json, home_folder, naming, remove_parts, write_json, write_text
from mlframework.reading import MOST_CONFIG, parsed_yaml, read_json, read_text
from mlframework.runs.git_state import first_git_state
from mlframework.runs.overrides import identity
from mlframework.runs.trusted import SIGNATURE, check_overrides, check_stored, signature_of

__all__ = ["PARTS", "RunFolder", "locked_file", "locked_folder"]

#: The parts of a run's config.
PARTS = ("task", "base_layer", "algorithm", "optimizer", "schedule", "outer", "trainer", "logger")

#: Files that the process with the lock writes, in the folder and in `checkpoints/`.
FILES = (
    *("config.yaml", "overrides.yaml", "choices.json", "environment.json", "task.json"),
    *("progress.json", "resumed.json", "result.json", SIGNATURE),
)
CHECKPOINTS = ("last.pt", "best.safetensors")

#: Packages whose versions are recorded.
RECORDED = ("mlframework", "torch", "numpy", "scikit-learn", "hydra-core", "omegaconf", "tensorboard")


#: Errors of a folder that is another user's, or on a disk that is read-only.
NOT_OWN = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunFolder:
    """Paths and records of one run.

    Args:
        path: `config.yaml`, `overrides.yaml`, `choices.json`, `environment.json`, `checkpoints/`, `result.json` and
            TensorBoard's events lie here; `task.json`, if there is one, has what using the run needs from its data;
            `progress.json` has the step of the last checkpoint; `resumed.json` lists the changes of each resume;
            `signature.json` proves that this user's key wrote the settings.
        key: the setting that named the folder, for messages.
    """

    #: The locks that this process holds for the jobs of a sweep, by folder.
    held: ClassVar[dict[Path, IO[str]]] = {}

    def __init__(self, path: Path | str, *, key: str = "run_dir") -> None:
        if not str(path).strip():
            raise InvalidValue(key, path, "must name a folder")
        self.path, self.key = Path(path), key
        self.lock: IO[str] | None = None  # while this process holds the folder
        self.last, self.best = (self.path / "checkpoints" / name for name in CHECKPOINTS)
        self.progress = self.path / "progress.json"  # the step of the last checkpoint, should that be lost
        self.result = self.path / "result.json"  # written last
        self.failed = self.path / "failed.json"  # the error of a failed job of a sweep

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    def check_new(self) -> None:
        """Refuses a folder that holds a run, or files of a run's names, or that is no folder for one run."""
        home = home_folder()
        if self.path.resolve() in (Path("/"), home and home.resolve()):
            raise InvalidValue(self.key, self.path, "must name a folder of the run's own, as in runs/mine")
        if self.holds_run:
            why = "holds a run already: resume=true continues it, or name another folder"
            raise InvalidValue(self.key, self.path, why)
        others = [name for name in FILES if (self.path / name).exists()]
        if others and not (self.path / ".lock").exists():
            raise InvalidValue(self.key, self.path, f"holds {others[0]}, which no run has written: name another folder")

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[None]:
        """Keeps other processes out until this one ends; removes files that an earlier one left half written.

        Args:
            wait: whether to wait for another process that uses the folder, and to let this one lock it again meanwhile,
                as a run within a job of a sweep does; both are errors otherwise.
        """
        here = self.path.resolve()
        if here in self.held:
            self.lock = self.held[here]
            yield
            return
        with locked_folder(self.key, self.path, "another process is using this run folder", wait=wait) as self.lock:
            if wait:
                self.held[here] = self.lock
            try:
                remove_parts(self.path, FILES)
                remove_parts(self.last.parent, CHECKPOINTS)
                yield
            finally:
                self.held.pop(here, None)
                self.lock = None

    def check_held(self) -> None:
        """Refuses to write where the folder was removed or replaced while this process held it: nothing is made anew.

        Raises:
            OSError: with the name of the folder.
        """
        if (lost := self.loss()) is not None:
            raise lost

    def loss(self) -> OSError | None:
        """How this process has lost the folder that it held; None if it has not."""
        if self.lock is None:
            return None
        try:
            found = os.stat(self.path / ".lock")
        except FileNotFoundError:
            why = "the folder is gone: it was removed or moved during the run"
            return FileNotFoundError(errno.ENOENT, why, str(self.path))
        if os.path.samestat(found, os.fstat(self.lock.fileno())):
            return None
        return OSError(errno.ESTALE, "another folder has taken its place during the run", str(self.path))

    @property
    def in_use(self) -> bool:
        """Whether some process holds the lock."""
        if not (self.path / ".lock").exists():
            return False
        try:
            lock = locked_file(self.path / ".lock")
        except OSError:  # no leave to look
            return False
        if lock is not None:
            lock.close()
        return lock is None

    def record(
        self, config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str], kept: Mapping[str, Any]
    ) -> None:
        """Writes the environment (versions, machine, the state of git), what the task keeps of its data, and settings.

        `kept` is what `TaskDistribution.kept` gave.
        """
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self.progress.unlink(missing_ok=True)  # of an earlier run
        if kept:
            write_json(self.path / "task.json", dict(kept))
        environment = {
            "folder": os.getcwd(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": {name: installed(name) for name in RECORDED},
            "git": first_git_state(),
        }
        write_json(self.path / "environment.json", environment)
        self.record_settings(config, overrides, choices)

    def record_settings(self, config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> None:
        """Writes the resolved config, the overrides, the options chosen of groups, and the user's signature of them."""
        texts = {
            "overrides.yaml": OmegaConf.to_yaml(OmegaConf.create(list(overrides))),
            "choices.json": as_json(dict(choices), indent=2) + "\n",
            "config.yaml": OmegaConf.to_yaml(config, resolve=True),
        }
        (self.path / SIGNATURE).unlink(missing_ok=True)
        if signature := signature_of(OmegaConf.to_container(config, resolve=True), texts):
            write_text(self.path / SIGNATURE, signature)
        for name, text in texts.items():  # the config last: with it the folder holds a run
            write_text(self.path / name, text)

    def record_step(self, step: int) -> None:
        """Writes the step of a checkpoint that is on the disk."""
        write_json(self.progress, {"step": step})

    def check_lost(self) -> None:
        """Refuses a folder without checkpoints whose run had written one of a step; one killed before that has none."""
        found = read_json(self.progress) if os.path.lexists(self.progress) else {}
        step = found.get("step", 0)
        if not isinstance(step, int):
            raise UserError(f"{self.progress}: damaged (its step is no whole number)")
        if step:
            why = f"no checkpoint is there any more, and the run had one of step {step}"
            raise UserError(
                f"{self.last.parent}: {why}: put it back, or start a new run; to begin here, remove the folder"
            )

    def kept(self) -> dict[str, Any]:
        """What the task keeps of its data, if anything."""
        path = self.path / "task.json"
        return dict(read_json(path)) if os.path.lexists(path) else {}

    def trained_in(self) -> Path | None:
        """The folder in which the command was typed; None where that is not known."""
        path = self.path / "environment.json"
        found = read_json(path).get("folder") if os.path.lexists(path) else None
        if not isinstance(found, str | None):
            raise UserError(f"{path}: damaged (its folder is no text)")
        return None if found is None else Path(found)

    def choices(self) -> dict[str, str]:
        """The option chosen of each config group."""
        return dict(read_json(self.path / "choices.json"))

    def overrides(self, *, to_compose: bool = False) -> list[str]:
        """The overrides that the user typed.

        Args:
            to_compose: refuses those that would read something that this user has not named.
        """
        path = self.path / "overrides.yaml"
        text = read_text(path, most=MOST_CONFIG)
        found = [str(override) for override in parsed_yaml(path, text, list)]
        if to_compose:
            check_overrides(found, path, text)
        return found

    def holds_job(self, overrides: Sequence[str]) -> bool:
        """Whether the run here has these overrides, those of later resumes included, in whichever order."""
        return self.holds_run and identity(self.overrides()) == identity(overrides)

    def finished(self, overrides: Sequence[str]) -> bool:
        """Whether a run with these overrides has come to its end."""
        if not os.path.lexists(self.result):
            return False
        return identity(overrides_in(self.result, self.read_result())) == identity(overrides)

    def diverged(self, overrides: Sequence[str]) -> str | None:
        """The error of a job with these overrides that would end in the same way again."""
        found = read_json(self.failed) if os.path.lexists(self.failed) else {}
        same = found.get("status") == "diverged" and identity(overrides_in(self.failed, found)) == identity(overrides)
        return str(found.get("error")) if same else None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes the result, by which a run has finished."""
        self.check_held()
        write_json(self.result, result)

    def read_result(self) -> dict[str, Any]:
        return dict(read_json(self.result))

    def config(self) -> DictConfig:
        """The resolved config; one that names code of neither this package nor this user is refused."""
        path = self.path / "config.yaml"
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no such run folder")
        if not path.is_file():
            raise UserError(f"{self.path}: not a run folder (it holds no config.yaml)")
        text = read_text(path, most=MOST_CONFIG)
        config: DictConfig = parsed_yaml(path, text, DictConfig, as_config)
        for name in (*PARTS, "seed"):
            if config.get(name) is None:
                raise UserError(f"{path}: damaged (it holds no {name})")
        check_stored(OmegaConf.to_container(config, resolve=False), path, text)
        return config

    def check_writable(self) -> None:
        """Refuses a folder in which no result can be written, before the work whose result that would be."""
        for folder in (self.path, self.path / "evaluations"):
            try:
                if folder.is_dir():
                    tempfile.TemporaryFile(dir=folder).close()  # a question to the system may be answered wrongly
            except OSError as error:
                if error.errno not in NOT_OWN:  # a full disk
                    raise OSError(error.errno, error.strerror, str(folder)) from error
                raise InvalidValue(self.key, self.path, not_writable(error)) from error

    def add_evaluation(self, content: Mapping[str, Any], *, asked: str = "") -> Path:
        """Writes an evaluation to the next of `evaluations/1.json`, ..., which is returned; nothing is overwritten.

        One of the run's own tasks is copied to `evaluation.json`, the latest. The name of another one ends with the
        settings that were `asked`, as in `evaluations/2_k_shot=5.json`.
        """
        folder = self.path / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        text = as_json(content, indent=2) + "\n"
        suffix = f"_{re.sub(r'[^A-Za-z0-9=.-]+', '_', asked)}"[:100] if asked else ""
        ours = (re.fullmatch(r"(\d+)(_.*)?\.json", path.name) for path in folder.iterdir())
        taken = [int(found[1]) for found in ours if found]
        part = folder / f"{uuid.uuid4().hex}.part"
        try:
            with naming(folder, part):
                part.write_text(text, encoding="utf-8")
            for number in itertools.count(max(taken, default=0) + 1):
                path = folder / f"{number}{suffix}.json"
                with suppress(FileExistsError):
                    os.link(part, path)
                    break
        finally:
            part.unlink(missing_ok=True)
        if not asked:
            write_text(self.path / "evaluation.json", text)
        return path


def locked_folder(key: str, path: Path, taken: str, *, wait: bool = False) -> IO[str]:
    """The lock of a folder, which is made if need be; `key` is the setting that named it, `taken` the error.

    With `wait` the error is a line instead, and the lock comes once the other process has let go of it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = locked_file(path / ".lock")
    except OSError as error:
        raise InvalidValue(key, path, why_not_locked(path, error)) from error
    if lock is None and wait:
        print(f"{path}: {taken}; waiting for it", flush=True)
        lock = locked_file(path / ".lock", wait=True)
    if lock is None:
        raise InvalidValue(key, path, taken)
    return lock


def not_writable(error: OSError) -> str:
    """What is said of a run folder that is there, and what to do where it is not the user's to change."""
    advice = ": copy the folder to one of your own, and name the copy" if error.errno in NOT_OWN else ""
    return f"cannot be written to ({error.strerror}){advice}"


def why_not_locked(path: Path, error: OSError) -> str:
    """Why a folder cannot be made or written to."""
    if path.is_dir():
        return not_writable(error)
    file = next((each for each in (path, *path.parents) if each.is_file()), None)
    return f"cannot be made ({error.strerror})" if file is None else f"{file} is a file: name a folder"


def locked_file(path: Path, *, wait: bool = False) -> IO[str] | None:
    """A file, made if need be, that other processes cannot lock until it is closed; None if one of them has."""
    # A pipe would wait for its other end; a link may lead to a file that is not there, which would be made.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    lock = os.fdopen(os.open(path, flags, 0o666), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    return lock


def as_config(text: str) -> Any:
    """The config in a YAML text."""
    try:
        return OmegaConf.create(text)
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error


def overrides_in(path: Path, record: Mapping[str, Any]) -> list[str]:
    """The overrides in a record that was read from `path`."""
    found = record.get("overrides", [])
    if not isinstance(found, list):
        raise UserError(f"{path}: damaged (its overrides are no list)")
    return [str(override) for override in found]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
