"""Shared by the commands: Hydra around a function, and one line for any error."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from mlframework import processes
from mlframework.cli import plugins
from mlframework.cli.private import explain_help, get_args_parser
from mlframework.errors import FailedRun, MachineFault, UserError
from mlframework.reading import MOST_CONFIG, check_file, check_yaml, read_bytes
from mlframework.runs import sweep
from mlframework.runs.check_config import check_config, check_keys
from mlframework.runs.error_report import Fault, cause, fault
from mlframework.runs.trusted import TRUST, trust
from mlframework.screen import LastingStream, lasting_streams, showing, stage
from mlframework.training.interrupt import heeding_signals

__all__ = ["command", "job"]

Job = Callable[[DictConfig], float | None]

#: Tells this process and a launcher's workers that the user asked for tracebacks.
TRACEBACKS = "MLFRAMEWORK_TRACEBACKS"


def job(
    *, settings: Mapping[str, Any], required: Sequence[str] = (), others: Sequence[str] = ()
) -> Callable[[Job], Job]:
    """Checks the config of a function that Hydra calls, and turns its errors into one line.

    A single run then ends with the error's exit code. A job of a sweep leaves its line in its folder and returns None,
    which sweepers take for a failure, so that the other jobs go on. A value that is not finite counts as None. For
    `settings` and `required` see `check_config`; `others` are further keys that the function reads.
    """

    def decorate(function: Job) -> Job:
        def run(config: DictConfig) -> float | None:
            with stage("importing torch, checking the settings"):
                check_keys(config, (*settings, *required, *others))
                check_config(config, settings=settings, required=required)
            value = function(config)
            return value if value is not None and math.isfinite(value) else None

        @functools.wraps(function)
        def checked(config: DictConfig) -> float | None:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                return in_sweep(run, config)
            try:
                return run(config)
            except Exception as error:
                # Not an Exception: Hydra would introduce that with lines of its own.
                raise SystemExit(report(error, config).exit_code) from None

        return checked

    return decorate


def in_sweep(run: Job, config: DictConfig) -> float | None:
    """Runs a job of a sweep; an error stays with it."""
    with sweep.current_job() as this:
        try:
            with stage(f"job {this.name}"):
                return run(config)
        except Exception as error:
            found = report(error, config, prefix=f"job {this.name}: ")
            if processes.leads() and this.record_failure(found, diverged=isinstance(cause(error), FailedRun)):
                log_failed_job(config, this, found)
            return None


def command(
    function: Job,
    *,
    config_name: str,
    rewrite: Callable[[Sequence[str]], list[str]] = list,
    ranks: bool = False,
    of_folder: str = "run",
    of_file: str = "",
) -> Callable[[], None]:
    """The entry point of a console script: composes `conf/<config_name>.yaml` and calls a job with it.

    Args:
        rewrite: changes the arguments that the user typed before Hydra reads them.
        ranks: whether several processes, as torchrun starts them, can share the work.
        of_folder, of_file: the keys that a user who types a path alone means.
    """
    run = hydra.main(version_base="1.3", config_path="pkg://mlframework.conf", config_name=config_name)(function)

    def main() -> None:
        with lasting_streams() as streams:
            exit_code = called(run_joined, rewrite, (of_folder, of_file)) or unread(streams)
        if exit_code:
            raise SystemExit(exit_code)

    def run_joined() -> None:
        refuse_ranks(config_name, sys.argv[1:], ranks)
        with processes.joined():
            run()

    return main


def called(run: Callable[[], object], rewrite: Callable[[Sequence[str]], list[str]], keys: tuple[str, str]) -> int:
    """Runs a job with the arguments that the user typed; returns the exit code. For `keys` see `refuse_bare_paths`."""
    exit_code, before = 0, os.environ.get("HYDRA_FULL_ERROR", "")  # the user's wish for tracebacks
    trusted_before = os.environ.get(TRUST, "")
    os.environ |= {TRACEBACKS: before, "HYDRA_FULL_ERROR": "1"}  # lets Hydra raise errors instead of printing them
    with processes.one_speaks(), showing(), heeding_signals():
        try:
            sys.argv[1:] = for_jobs(rewrite(trust(sys.argv[1:])))
            refuse_bare_paths(refuse_unknown_flags(), *keys)
            import_from_here()
            plugins.register()
            run()
        except Exception as error:
            exit_code = report(error).exit_code
        except KeyboardInterrupt as stop:
            print(str(stop) or "interrupted", file=sys.stderr)
            exit_code = 128 + getattr(stop, "number", signal.SIGINT)  # as shells and schedulers count signals
        finally:
            os.environ |= {"HYDRA_FULL_ERROR": before, TRUST: trusted_before}
        try:
            of_sweep = sweep.conclude()
        except Exception as error:
            of_sweep = report(error).exit_code
    return exit_code or of_sweep


def unread(streams: Sequence[LastingStream]) -> int:
    """The exit code for output that could not be written to its end; says so where that can still be read."""
    for stream in streams:
        stream.flush()
        if stream.error is not None:
            print(f"{stream.name}: not all could be written ({stream.error.strerror})", file=sys.stderr)
            closed = isinstance(stream.error, BrokenPipeError)
            return 128 + signal.SIGPIPE if closed else MachineFault.exit_code
    return 0


def log_failed_job(config: DictConfig, job: sweep.Job, found: Fault) -> None:
    """Shows a job that failed before it had a logger among the runs of the logger."""
    from mlframework.runs.run import log_failure

    choices = {g: o for g, o in HydraConfig.get().runtime.choices.items() if not g.startswith("hydra/")}
    with suppress(Exception):  # the settings of the logger may be those that are wrong
        log_failure(config, job.run, overrides=job.overrides, choices=choices, error=found.line)


def report(error: Exception, config: DictConfig | None = None, *, prefix: str = "") -> Fault:
    """Prints the line of an error on stderr, after a traceback if the user asked for one."""
    if os.environ.get(TRACEBACKS) == "1":
        traceback.print_exception(error)
    found = fault(error, config)
    processes.tell(f"{prefix}{found.line}", lost=isinstance(cause(error), processes.RankFailed))
    return found


def refuse_ranks(name: str, arguments: Sequence[str], ranks: bool) -> None:
    """Refuses a command or a sweep as one of several processes."""
    if not processes.is_started():
        return
    if not ranks:
        raise UserError(f"mlframework-{name}: takes one process, and WORLD_SIZE={os.environ['WORLD_SIZE']}")
    if {"-m", "--multirun"} & {*arguments}:
        raise UserError("-m: a sweep gives its jobs several processes each by launcher=submitit, slurm or ray")


def refuse_unknown_flags() -> list[str]:
    """The overrides among the arguments. Checks the folder of configs.

    Flags that Hydra does not know are refused in one line; it would print its usage before.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: --hydra-help lists the flags")

    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_args()
    if given.config_dir:
        check_config_folder(Path(given.config_dir))
        check_configs(Path(given.config_dir))
    if given.help:
        explain_help()
    return list(given.overrides)


def check_config_folder(folder: Path) -> None:
    """Refuses what is no folder; Hydra says of a file that it is not there."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else f"there is no such folder, looked for at {folder.absolute()}"
        raise UserError(f"--config-dir {folder}: {what}: must name a folder, with a folder of yaml files per group")


def refuse_bare_paths(overrides: Sequence[str], of_folder: str, of_file: str) -> None:
    """Refuses a path without its key, and says which key it wants: `of_folder` or `of_file`, as what is there."""
    for each in overrides:
        if "=" in each or each.startswith("~"):  # ~task leaves the task out
            continue
        key = of_file if os.path.isfile(each) else of_folder
        if key and (os.path.exists(each) or os.sep in each):
            more = " resume=true" if key == "run_dir" and os.path.exists(f"{each}/config.yaml") else ""
            raise UserError(f"{each}: cannot be read as key=value: type {key}={each}{more}")


def check_configs(folder: Path) -> None:
    """Refuses configs of the user's that are no files, or that would take minutes or gigabytes to read."""
    for path in sorted(folder.rglob("[!.]*.yaml")):
        check_file(path, most=MOST_CONFIG)
        check_yaml(path, read_bytes(path).decode("utf-8", errors="replace"))


def for_jobs(arguments: Sequence[str]) -> list[str]:
    """Lets the jobs of a sweep alone check the settings of a group whose options are swept.

    Hydra reads `-m task=glyphs,omniglot task.n_way=20` with the default task first, and refuses what that one lacks. A
    sweep over one value, `task.n_way=choice(20)`, reaches each job as `task.n_way=20`, and is not read before.
    """
    if not {"-m", "--multirun"} & {*arguments}:
        return list(arguments)
    parsed = {each: override for each in arguments if (override := as_override(each)) is not None}
    groups = {
        o.key_or_group.split("/")[0] for o in parsed.values() if o.is_sweep_override() and "." not in o.key_or_group
    }
    found = []
    for each in arguments:
        key, _, value = each.partition("=")
        head, _, rest = key.partition(".")
        waits = each in parsed and rest and head != "hydra" and not parsed[each].is_sweep_override()
        one = f"{key}=choice({value})" if waits and {head, "experiment"} & groups else each
        found.append(one if as_override(one) is not None else each)
    return found


def as_override(argument: str) -> Override | None:
    """An argument as Hydra's override; None if it is none, as a flag."""
    try:
        return None if argument.startswith("-") else OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def import_from_here() -> None:
    """Lets `_target_` name modules in the current folder, as it would under `python -m`; launchers' workers too."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*known, here]))
