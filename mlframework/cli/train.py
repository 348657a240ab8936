"""`mlframework-train`: meta-trains, then evaluates."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mlframework import processes
from mlframework.cli.command_line import command, job
from mlframework.errors import FailedRun, InvalidValue, MachineFault
from mlframework.runs.error_report import fault
from mlframework.runs.overrides import of_run
from mlframework.runs.resume import changed_since
from mlframework.runs.run_folder import PARTS, RunFolder
from mlframework.runs.sweep import AGAIN
from mlframework.screen import stage

__all__ = ["train_command"]

log = logging.getLogger(__name__)

SETTINGS = {
    "seed": int,
    "threads": int | None,
    "allocator": Literal["tuned", "system"],
    "device": str,
    "run_dir": str,
    "init": str | None,
    "resume": bool,
    "train_tasks": int | None,
}

#: Further keys that a training reads; an evaluation, displays and regularisers may be left out.
OTHERS = ("evaluation", "display", "regulariser", "suggested")


@job(settings=SETTINGS, required=PARTS, others=OTHERS)
def train_command(config: DictConfig) -> float | None:
    """One run; returns the monitored validation metric, for sweepers."""
    hydra_config = HydraConfig.get()
    overrides = of_run(hydra_config.overrides.task)
    choices = {g: option for g, option in hydra_config.runtime.choices.items() if not g.startswith("hydra/")}
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    if in_sweep:
        config.run_dir = hydra_config.runtime.output_dir
    config.run_dir = common_folder(config, hydra_config.overrides.task)
    folder = RunFolder(config.run_dir)
    again = f"mlframework-train run_dir={folder.path} resume=true"
    if in_sweep:
        same, before = processes.agreed(lambda: job_before(folder, overrides, config))
        if before:
            return monitored(before)
        config.resume = same or (config.resume and folder.holds_run)
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        config.resume = processes.agreed(lambda: config.resume or folder.holds_job(overrides))

    # Imported here, so that neither --help nor completion nor a job that ended before waits for torch.
    with stage("importing"):
        from mlframework.runs.run import train_run
        from mlframework.runs.tables import show_report

    try:
        result, _ = train_run(config, folder, overrides=overrides, choices=choices, show=show_report)
    except KeyboardInterrupt:
        if folder.last.exists() and not in_sweep:
            print(f"{again} goes on", file=sys.stderr)
        raise
    except Exception as error:
        found = fault(error, config)
        if in_sweep or not folder.last.exists():
            raise
        if found.exit_code == MachineFault.exit_code:
            raise MachineFault(f"{found.line}; then {again} goes on") from error
        if isinstance(error, processes.RankFailed) and error.silent and not restarts_itself():
            raise processes.RankFailed(f"{error}; {again} goes on") from error
        raise
    if not in_sweep:
        print(f"next: mlframework-evaluate run={folder.path}, or tensorboard --logdir {folder.path}", file=sys.stderr)
    return monitored(result)


def common_folder(config: DictConfig, overrides: Sequence[str]) -> str:
    """The run folder of all ranks, whose clocks may differ; one that a restart finds again."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if processes.count() > 1 and restarts and not any(o.startswith("run_dir=") for o in overrides):
        raise InvalidValue("run_dir", config.run_dir, "must be given with --max-restarts, so that a restart finds it")
    return processes.agreed(lambda: str(config.run_dir))


def restarts_itself() -> bool:
    """Whether torchrun starts all ranks again when one of them has ended."""
    count, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(count) < int(most)


def job_before(folder: RunFolder, overrides: list[str], config: DictConfig) -> tuple[bool, dict[str, Any] | None]:
    """Whether a folder holds this job, and its result if it has ended before."""
    same = folder.holds_job(overrides)
    return same, result_before(folder, overrides, config) if same else None


def result_before(folder: RunFolder, overrides: list[str], config: DictConfig) -> dict[str, Any] | None:
    """The result of the same job, if it has ended before; one that diverged is not tried again."""
    for key, (then, now) in changed_since(folder, config).items():
        log.warning("%s: runs with %s=%s, which is %s now", folder.path, key, then, now)
    if folder.finished(overrides):
        print(f"{folder.path}: finished before")
        return folder.read_result()
    if why := folder.diverged(overrides):
        raise FailedRun(why + AGAIN)
    return None


def monitored(result: dict[str, Any]) -> float | None:
    """The metric that a sweeper optimises; None if it was not finite."""
    return result["validation"][result["monitor"]]["mean"]


main = command(train_command, config_name="train", ranks=True, of_folder="run_dir", of_file="init")

if __name__ == "__main__":
    main()
