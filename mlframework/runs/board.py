"""The board: one file for each result, with all that is needed to repeat it and to check its tasks."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import OmegaConf

from mlframework.episode import Split
from mlframework.errors import UserError, nearest
from mlframework.evaluation.task_set import TaskSet
from mlframework.files import write_json
from mlframework.reading import read_json
from mlframework.runs.build import build_task
from mlframework.runs.trusted import check_stored

__all__ = ["BoardRecord", "add_to_board", "machine", "read_board", "task_set_of"]

#: Where `board=true` writes, below the current folder.
BOARD = Path("results") / "board"


@dataclass(frozen=True, kw_only=True)
class BoardRecord:
    """One method on one frozen set of tasks."""

    task: str  # the name of the task's option
    task_config: dict[str, Any]  # its resolved config, from which the tasks are drawn anew
    split: str
    tasks: int
    task_seed: int  # of the draws
    hash: str  # of these tasks
    method: str
    setting: str  # chosen on validation tasks
    metric: str
    mean: float
    half_width: float  # of the 95 % interval over tasks
    over_sources: float | None  # of that over the sources of the tasks, where tasks share some
    seeds: list[int]  # of the training
    command: str  # of the comparison
    trained: str  # the command of the training
    is_algorithm: bool  # whether the method is the algorithm that was trained
    commit: str
    machine: str

    @classmethod
    def read(cls, path: Path) -> BoardRecord:
        """A record in a file; a `UserError` names the file and the field that is missing, unknown or wrong."""
        content = read_json(path)
        names = [field.name for field in fields(cls)]
        for name in content:
            if name not in names:
                raise UserError(f"{path}: {name} is no field{nearest(name, names)}; there are {', '.join(names)}")
        for name in names:
            if name not in content:
                raise UserError(f"{path}: {name} is missing")
        record = cls(**content)
        for name, why in record.faults():
            raise UserError(f"{path}: {name}={getattr(record, name)!r}: {why}")
        check_stored({"task_config": record.task_config}, path)  # somebody else may have written it
        return record

    def faults(self) -> Iterator[tuple[str, str]]:
        """The fields with wrong values, and why."""
        for name in ("hash", "commit"):
            length = 16 if name == "hash" else 40
            if not re.fullmatch(rf"[0-9a-f]{{{length}}}", str(getattr(self, name))):
                yield name, f"must be {length} hexadecimal digits"
        if self.split not in get_args(Split):
            yield "split", f"must be one of {', '.join(get_args(Split))}"
        for name in ("tasks", "task_seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < (name == "tasks"):
                yield name, "must be a whole number"
        for name in ("mean", "half_width", "over_sources"):
            value = getattr(self, name)
            if not (type(value) in (int, float) and (name == "mean" or value >= 0)) and (name, value) != (
                "over_sources",
                None,
            ):
                yield name, "must be a number"
        if not (isinstance(self.seeds, list) and self.seeds and all(type(seed) is int for seed in self.seeds)):
            yield "seeds", "must be a list of the training seeds"
        if type(self.is_algorithm) is not bool:
            yield "is_algorithm", "must be true or false"
        for name in ("task", "method", "metric", "command", "trained", "machine"):
            if not (isinstance(getattr(self, name), str) and getattr(self, name)):
                yield name, "must be text"
        if not (isinstance(self.task_config, dict) and "_target_" in self.task_config):
            yield "task_config", "must be the config of a task, with its _target_"

    @property
    def file_name(self) -> str:
        """A name that the same method on the same tasks with the same seeds has again; an algorithm, trained alike."""
        named = re.sub(r"[^a-z0-9]+", "_", f"{self.task} {self.method}".lower()).strip("_")
        trained = [hashlib.sha256(self.trained.encode()).hexdigest()[:6]] if self.is_algorithm else []
        return "_".join([named, self.hash[:8], *trained, *map(str, self.seeds)]) + ".json"


def add_to_board(comparison: Mapping[str, Any], board: Path) -> list[Path]:
    """Writes a record for each method of a `comparison.json`, on the run's own tasks.

    An older record of the same method on the same tasks, with the same seeds, gives way; an algorithm that was trained
    otherwise has a record of its own.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", str(comparison["commit"])):
        raise UserError(
            f"commit={comparison['commit']}: the board takes results of a commit: compare in a git checkout"
        )
    own, paths = comparison["own"], []
    task = build_task(OmegaConf.create({"task": comparison["task_config"]}))
    shared = {name: comparison[name] for name in ("task", "task_config", "command", "trained", "commit", "machine")}
    hashes = {own["tasks"]: own["task_hash"]}
    for row in (standing["row"] for standing in own["standings"]):
        if row["tasks"] not in hashes:
            hashes[row["tasks"]] = TaskSet(task, own["split"], tasks=row["tasks"], seed=own["seed"]).hash()
        found = row["metrics"][own["metric"]][list(row["steps"]).index(row["chosen"])]
        record = BoardRecord(
            split=own["split"],
            tasks=row["tasks"],
            task_seed=own["seed"],
            hash=hashes[row["tasks"]],
            method=row["method"] if row["batch_norm"] == "none" else f"{row['method']} ({row['batch_norm']})",
            setting=row["setting"],
            metric=own["metric"],
            **{name: found[name] for name in ("mean", "half_width", "over_sources")},
            seeds=[comparison["seed"]],
            is_algorithm=row["method"] == own["standings"][0]["row"]["method"],
            **shared,
        )
        paths.append(board / record.file_name)
        write_json(paths[-1], asdict(record))
    return paths


def read_board(board: Path) -> dict[Path, BoardRecord]:
    """All records of a board, by file."""
    return {path: BoardRecord.read(path) for path in sorted(board.glob("*.json"))}


def task_set_of(record: BoardRecord) -> TaskSet:
    """The tasks of a record, drawn anew; nothing is downloaded for it."""
    config = {**record.task_config, **({"download": False} if "download" in record.task_config else {})}
    task = build_task(OmegaConf.create({"task": config}))
    return TaskSet(task, record.split, tasks=record.tasks, seed=record.task_seed)  # type: ignore[arg-type]


def machine() -> str:
    """The processor with its number of cores, and the version of torch."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
