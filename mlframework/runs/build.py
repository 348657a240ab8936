"""Config to objects."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mlframework import processes
from mlframework.base_layers.base_layer import BaseLayer, as_base_layer
from mlframework.base_layers.check_base_layer import check_base_layer
from mlframework.base_layers.weight_files import SUFFIXES, follow, load_base_layer
from mlframework.errors import InvalidValue, UserError, part_of
from mlframework.evaluation.part import Display
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs.check_config import is_part
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks.fixed_train_tasks import fix_train_tasks
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training.outer_loop import OuterLoop

if TYPE_CHECKING:  # its imports are slow; a run without evaluation does without them
    from mlframework.evaluation.evaluation import Evaluation

__all__ = [
    *("build_base_layer", "build_device", "build_displays", "build_evaluation"),
    *("build_meta_layer", "build_outer_loop", "build_task"),
]

log = logging.getLogger(__name__)


def build_task(config: DictConfig) -> TaskDistribution:
    task = instantiate(config.task)
    count = config.get("train_tasks")
    return task if count is None else fix_train_tasks(task, count, seed=config.seed)


def build_base_layer(config: DictConfig, task: TaskDistribution) -> BaseLayer:
    base_layer = as_base_layer(instantiate(config.base_layer, _partial_=True)(task.spec))
    check_base_layer(base_layer, task.spec)
    return base_layer


def build_meta_layer(config: DictConfig, task: TaskDistribution) -> MetaLayer:
    base_layer = build_base_layer(config, task)
    # Before the algorithm, which may put modules of its own between those of the base layer.
    if config.get("init") and not follow():
        start_from(config.init, base_layer)
    meta_layer = instantiate(config.algorithm, _partial_=True)(base_layer, task)
    meta_layer.regularise(build_named(config.get("regulariser")))
    return meta_layer


def start_from(init: str, base_layer: BaseLayer) -> None:
    """Loads the best weights of a run folder, or a file of weights, into a base layer, or into its body alone."""
    path = Path(init).expanduser()
    if path.suffix not in SUFFIXES and not path.is_file():
        path = RunFolder(init, key="init").best
        if not path.is_file():
            why = f"{path}: there is no such checkpoint: no run there, or none that has come to a validation"
            raise InvalidValue("init", init, f"{why}; or name a file of weights ({', '.join(SUFFIXES)})")
    try:
        left = load_base_layer(base_layer, path)
    except UserError as error:
        raise InvalidValue("init", init, str(error)) from error
    if left:
        log.info("init=%s: %s start anew or are left out: no such weights fit", init, ", ".join(left))


def build_outer_loop(config: DictConfig, meta_layer: MetaLayer) -> OuterLoop:
    learned, schedule = [p for p in meta_layer.parameters() if p.requires_grad], config.schedule
    optimizer = instantiate(config.optimizer)([{"params": learned}])  # of which there may be none
    # Settings that torch's schedules accept and that make a rate rise or fall below zero.
    for name, least in {"T_max": 1, "total_iters": 1, "eta_min": 0}.items():
        if name not in schedule or OmegaConf.is_interpolation(schedule, name):  # the key referred to is checked
            continue
        if not (isinstance(value := schedule[name], int | float) and value >= least):
            raise InvalidValue(f"schedule.{name}", value, f"must be at least {least}")
    return instantiate(config.outer)(meta_layer, optimizer, instantiate(schedule)(optimizer))


def build_evaluation(config: DictConfig) -> Evaluation | None:
    """The evaluation at the end of a run; None with `evaluation=none`."""
    # With evaluation=none an experiment's settings of the evaluation remain, without a _target_.
    if not is_part(config.get("evaluation")):
        return None
    groups = {group: build_named(config.evaluation.get(group)) for group in ("baseline", "measure")}
    plain = {name: value for name, value in config.evaluation.items() if name not in groups}
    return instantiate({**plain, **dict.fromkeys(groups)}, _partial_=True)(**groups)


def build_displays(config: DictConfig, task: TaskDistribution) -> dict[str, Display]:
    """The displays of a training by name, each of which can show the task."""
    displays: dict[str, Display] = build_named(config.get("display"))
    for name, display in displays.items():
        with part_of(f"display.{name}"):
            display.check(task)
    return displays


def build_named(group: DictConfig | None) -> dict[str, Any]:
    """The parts of a group of which several may be chosen; settings of one that is not chosen have no _target_."""
    return {str(name): instantiate(part) for name, part in (group or {}).items() if is_part(part)}


def build_device(name: str) -> torch.device:
    """The device of that name, with its number where it has one; `auto` is the GPU if there is one.

    Of several processes on a machine each takes a GPU of its own, unless the name has a number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1 and torch.cuda.device_count():
        name = f"cuda:{processes.local_rank() % torch.cuda.device_count()}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # one or the other, depending on torch's build
        there = ("auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
        raise InvalidValue("device", name, f"must be one of {', '.join(there)} on this machine") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events belong to the current device
    processes.sum_on(device)
    return device
