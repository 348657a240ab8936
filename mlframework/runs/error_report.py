"""Turns any error into one line and an exit code: 2 for the user's input, 75 for the machine, 1 for any other."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from importlib.resources import files
from typing import NamedTuple

import yaml  # type: ignore[import-untyped]
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from mlframework.errors import FailedRun, IncompatibleKind, InvalidValue, MachineFault, UserError, nearest
from mlframework.runs.check_config import located, parts

__all__ = ["Fault", "cause", "fault"]

#: Errors of the system that come from writing alone: a full disk, a quota, a limit, a disk that is read-only.
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

#: What torch says when the system gives it no memory.
NO_MEMORY = "can't allocate memory"


class Fault(NamedTuple):
    """The line that is printed for an error, and the exit code of the process."""

    line: str
    exit_code: int


def fault(error: Exception, config: DictConfig | None = None) -> Fault:
    """The line and the exit code for an error; the config of the run tells from which override an object was built."""
    where, root, exit_code = built_from(error, config), cause(error), UserError.exit_code
    if isinstance(root, InvalidValue):
        value = "null" if root.value is None else str(root.value)
        key = f"{where}.{root.field}" if where else root.field
        line = f"{key}={value.lower() if isinstance(root.value, bool) else value}: {root.why}"
    elif isinstance(root, IncompatibleKind):
        line = incompatible(root)
    elif (path := config_file(root)) is not None:
        line = f"{path}: cannot be read as a config ({in_yaml(root)})"
    elif isinstance(root, UserError | FailedRun | MachineFault):
        line, exit_code = str(root), root.exit_code
    elif isinstance(root, HydraException | OmegaConfBaseException):
        line = composition(root)
    elif (override := override_at_fault(root)) is not None:
        line = f"{override.input_line}: must be an option of the group {override.key_or_group}; --help lists them"
    elif (lacking := of_memory(root) or (None if where else of_files(root))) is not None:
        line, exit_code = lacking, MachineFault.exit_code
    elif where:
        line = f"{where}: cannot be built: {named(root)}"
    else:
        line, exit_code = failure(root), FailedRun.exit_code
    return Fault(" ".join(line.split()), exit_code)


def override_at_fault(error: BaseException) -> Override | None:
    """The override that Hydra held when it raised a plain ValueError, as it does for `task=null`."""
    for frame, _ in traceback.walk_tb(error.__traceback__ if isinstance(error, ValueError) else None):
        if frame.f_globals["__name__"].startswith("hydra.") and isinstance(frame.f_locals.get("override"), Override):
            return frame.f_locals["override"]
    return None


def config_file(error: BaseException) -> str | None:
    """The file of YAML that was being read when an error was raised, if one was."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        place = frame.f_globals["__name__"], frame.f_code.co_name
        if place == ("omegaconf.omegaconf", "load"):
            return str(frame.f_locals["file_"])
        if place[0].startswith("hydra.") and place[1] == "load_config" and isinstance(error, ValueError | OSError):
            return str(frame.f_locals.get("full_path") or frame.f_locals.get("config_path"))
    return None


def in_yaml(error: BaseException) -> str:
    """The place and the fault in a file of YAML."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else named(error)


def incompatible(error: IncompatibleKind) -> str:
    """Names the two as they were chosen."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    algorithm, task = choices.get("algorithm"), choices.get("task")
    return error.told(f"algorithm={algorithm}", f"task={task}") if algorithm and task else str(error)


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def cause(error: BaseException) -> BaseException:
    """The error that made Hydra's `instantiate` fail; any other error itself."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def of_memory(error: BaseException) -> str | None:
    """The line for memory that is full; None for other errors."""
    less = "a smaller outer.chunk or trainer.meta_batch needs less"
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full: {less}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY in str(error)):
        return f"the memory is full: {less}"
    return None


def of_files(error: BaseException) -> str | None:
    """The line for a file that cannot be read or written; None for other errors."""
    if not isinstance(error, OSError):
        return None
    if error.filename is None or error.strerror is None:
        return named(error)
    how = "cannot be written" if error.errno in OF_WRITING else "cannot be read or written"
    return f"{error.filename}: {how} ({error.strerror})"


def failure(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{named(error)} ({last.filename}:{last.lineno}; HYDRA_FULL_ERROR=1 shows the whole traceback)"


def built_from(error: Exception, config: DictConfig | None) -> str | None:
    """The config key of the object that raised an error.

    An `InvalidValue` belongs to the innermost object whose config has such a setting, best with that value; any other
    error to the object whose constructor raised it.
    """
    root = cause(error)
    frames = [frame for frame, _ in traceback.walk_tb(root.__traceback__) if "self" in frame.f_locals]
    known = list(parts(config)) if frames and config is not None else []
    for frame in reversed(frames):
        kind = type(frame.f_locals["self"])
        found = {key: part for key, part in known if located(part._target_) is kind}
        if isinstance(root, InvalidValue):
            settings = {key: part[root.field] for key, part in found.items() if root.field in part}
            if settings:
                return max(settings, key=lambda key: str(settings[key]) == str(root.value))
        elif found and frame.f_code.co_name == "__init__":
            return next(iter(found))
    full_key = re.search(r"full_key: (\S+)$", str(error)) if isinstance(error, InstantiationException) else None
    return full_key.group(1) if full_key else None


def composition(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf: the override or key, and a right value."""
    reason, text = error.__cause__, first_line(error)
    if isinstance(error, MissingConfigException):
        return missing_option(error)
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        hint = f"; quotes keep special characters: '{key}=\"{value}\"'" if value else ""
        return f"{error.override}: cannot be read as key=value{hint}"
    if isinstance(reason, ConfigAttributeError | ConfigKeyError):
        return unknown_key(str(error), reason)
    if isinstance(reason, OmegaConfBaseException):
        return f"{text.removeprefix('Error merging override ')}: {first_line(reason)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: must be given, as in {error.full_key}=..."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text}"
    if there_already := re.search(r"An item is already at '(.+)'", text):
        return f"+{there_already[1]}=...: is there already: without the + it is set"
    if ambiguous := re.match(r"Ambiguous value for argument '(.+)'$", text):
        return f"{ambiguous[1]}: several values make a sweep, with -m; a list is written [a,b]"
    return text


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def missing_option(error: MissingConfigException) -> str:
    """An option that its group does not have; a config that is not there at all."""
    missing = error.missing_cfg_file or ""
    group, _, option = missing.rpartition("/")
    options = error.options or own_options(group)
    if not options:
        return first_line(error)
    return f"{group}={option}: no such option{nearest(option, options)}; there are {', '.join(options)}{own_folder()}"


def own_folder() -> str:
    """How the user's own options are found, if the user has not said where they are."""
    typed = any(each.startswith(("--config-dir", "-cd", "hydra.searchpath=")) for each in sys.argv[1:])
    return "" if typed else "; options of your own need --config-dir"


def own_options(group: str) -> list[str]:
    """The options of a group in this package: for a list of options Hydra names none."""
    folder = files("mlframework.conf").joinpath(*group.split("/"))
    names = [file.name for file in folder.iterdir()] if group and folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def unknown_key(text: str, reason: OmegaConfBaseException) -> str:
    """A key that the config does not have, or that its part of the config does not."""
    key = str(reason.full_key or reason.key)
    override = text.partition("use +")[2].strip() or key
    if "/" in key:
        return f"{override}: there is no group {key}; --help lists the groups"
    keys = [str(name) for name in (reason.parent_node or {}) if name != "hydra" and not str(name).startswith("_")]
    there_are = f"{nearest(str(reason.key), keys)}; there are {', '.join(keys)}" if keys else ""
    return f"{override}: there is no {key}{there_are}"
