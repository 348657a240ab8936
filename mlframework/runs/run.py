"""A run, from its config to its result: build, train, evaluate, record."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from mlframework import processes
from mlframework.backend.step import import_compiler, tune
from mlframework.base_layers.base_layer import BaseLayer, InEvaluation
from mlframework.base_layers.weight_files import weights_follow
from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.files import leaves
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs import build
from mlframework.runs.asked import Asked, check_divided_alike, refusal
from mlframework.runs.check_config import check_episodes, located, not_imported, parts
from mlframework.runs.contenders import without_misfits
from mlframework.runs.error_report import fault
from mlframework.runs.git_state import first_git_state
from mlframework.runs.resume import Resumed, resumed
from mlframework.runs.run_folder import RunFolder
from mlframework.runs.try_out import try_out
from mlframework.screen import stage
from mlframework.tasks.on_features import on_features
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training import checkpoint, last_checkpoints
from mlframework.training.checkpoint import Progress, Training
from mlframework.training.logger import Logger, Silent
from mlframework.training.trainer import Trainer

if TYPE_CHECKING:
    from mlframework.evaluation.evaluation import Evaluation
    from mlframework.evaluation.report import Report

__all__ = ["check_importable", "evaluate_run", "find_data", "load_run", "train_run"]

log = logging.getLogger(__name__)

#: Torch's own number of threads; an earlier job of a sweep may have changed the present one.
THREADS = torch.get_num_threads()

#: More threads gain nothing, and far more crash torch.
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))


def train_run(
    config: DictConfig,
    folder: RunFolder,
    *,
    overrides: Sequence[str] = (),
    choices: Mapping[str, str] | None = None,
    show: Callable[[Report, str], None] | None = None,
) -> tuple[dict[str, Any], Report | None]:
    """Meta-trains and evaluates a config as composed from `conf/train.yaml`.

    Args:
        overrides, choices: the user's, and the option chosen of each config group, for the record.
        show: takes the evaluation and the name of the monitored metric, before the result is written.

    Returns:
        The content of `result.json`, and the evaluation if the config asks for one.
    """
    run, choices = processes.agreed(lambda: begun(config, folder, overrides)), choices or {}
    if run is not None:
        with open_dict(config):
            config.update(run.config)  # errors find their key in the caller's config
        config, overrides, choices = run.config, run.overrides, run.choices
    prepare_process(config)
    training, trainer, evaluation = build_checked(config, folder)
    with folder.locked() if processes.leads() else nullcontext():
        progress = start(
            training, config, folder, partial(folder.record, config, overrides, choices, training.task.kept())
        )
        if progress.step > trainer.steps:
            raise InvalidValue("trainer.steps", trainer.steps, f"this run has taken {progress.step} steps already")
        if run is not None and processes.leads():
            run.record(folder, progress.step)
        log.info("run folder %s%s: %s", folder.path, resuming(config, progress), " ".join(overrides) or "the defaults")
        with logging_to(config, folder, progress.step) as logger:
            logger.config(config, choices, overrides)
            progress = meta_train(training, trainer, logger, progress)
            report = evaluate(evaluation, config, training, choices) if evaluation is not None else None
            result: dict[str, Any] = {"status": "finished", "overrides": list(overrides), "choices": dict(choices)}
            result |= {**outcome(training, trainer, progress), "evaluation": report and report.to_json()}
            log_outcome(logger, trainer, progress, result, report)
            if show is not None and report is not None:
                show(report, trainer.monitor)
            if processes.leads():
                folder.write_result(result)
    return result, report


def begun(config: DictConfig, folder: RunFolder, overrides: Sequence[str]) -> Resumed | None:
    """The run that goes on; None for a new one, which no run is in the way of."""
    if config.resume:
        run = resumed(folder, overrides)
        if not last_checkpoints.kept(folder.last):
            folder.check_lost()
        return run
    folder.check_new()
    return None


def resuming(config: DictConfig, progress: Progress) -> str:
    """Where a run goes on, as a part of a line; empty for a new run."""
    if not config.resume:
        return ""
    return f", goes on at step {progress.step}" if progress.step else ", no step is in a checkpoint: starts at step 0"


@contextmanager
def logging_to(config: DictConfig, folder: RunFolder, start: int) -> Iterator[Logger]:
    """The logger of a run, which learns how the run ends."""
    logger: Logger = instantiate(config.logger)(folder.path, start=start) if processes.leads() else Silent(folder.path)
    try:
        yield logger
    except Exception as error:
        with suppress(OSError):  # on a full disk
            logger.close(None if folder.loss() else fault(error, config).line)
        raise
    except BaseException:
        with suppress(OSError):
            logger.close()
        raise
    logger.close(finished=True)


def log_failure(
    config: DictConfig, folder: RunFolder, *, overrides: Sequence[str], choices: Mapping[str, str], error: str
) -> None:
    """Tells the logger of a run that failed before it began; of others it knows already."""
    if not folder.holds_run:
        logger: Logger = instantiate(config.logger)(folder.path, start=0)
        logger.config(config, choices, overrides)
        logger.close(error)


def log_outcome(
    logger: Logger, trainer: Trainer, progress: Progress, result: Mapping[str, Any], report: Report | None
) -> None:
    """The metrics of the best weights, at their step, and the algorithm's test metrics, at the last one."""
    assert progress.best_step is not None
    best = {name: value["mean"] for name, value in result["validation"].items()}
    scalars = {f"best/{name}": value for name, value in best.items()}
    logger.scalars({**scalars, "best/step": progress.best_step}, progress.best_step)
    if report is not None and report.split == "test":  # another split has curves of its own
        row = report.rows[0]
        logger.intervals(report.split, {name: row.interval(name) for name in row.metrics}, progress.step)


def check_process(config: DictConfig) -> None:
    """Refuses a number of threads that torch does not take."""
    if config.threads is not None and not 1 <= config.threads <= MOST_THREADS:
        why = f"must be from 1 to {MOST_THREADS} on this machine, or null for torch's own number"
        raise InvalidValue("threads", config.threads, why)


def prepare_process(config: DictConfig) -> None:
    """Sets the allocator, the number of threads and the global seed."""
    check_process(config)
    if config.get("allocator") == "tuned":
        tune()
    torch.set_num_threads(config.threads or THREADS)
    torch.manual_seed(config.seed)


def build_checked(config: DictConfig, folder: RunFolder) -> tuple[Training, Trainer, Evaluation | None]:
    """Builds all parts of a run and tries each of them once, so that no mistake comes to light after the training."""
    resumes = processes.agreed(lambda: config.resume and bool(last_checkpoints.kept(folder.last)))
    with stage("building"), weights_follow() if resumes else nullcontext():
        training = set_up(config, folder)
    if resumes:
        checkpoint.restore(training, quiet=True)  # the trial below runs on the restored training
    training = training._replace(displays=build.build_displays(config, training.task))
    trainer: Trainer = instantiate(config.trainer)
    logger = instantiate(config.logger)
    logger.func.check(**logger.keywords)
    evaluation = build.build_evaluation(config)
    if evaluation is not None:
        evaluation.check(training.task)
    check_episodes(config, training.task.spec)
    with stage("trying each part once"):
        metrics = try_out(training, partial(build_anew, config, training.task))
    trainer.check(training.meta_layer, metrics)
    return training, trainer, evaluation


def build_anew(config: DictConfig, task: TaskDistribution) -> MetaLayer:
    """A newly initialised algorithm whose weights follow."""
    with weights_follow():
        return build.build_meta_layer(config, task)


def meta_train(training: Training, trainer: Trainer, logger: Logger, progress: Progress) -> Progress:
    """Trains to the end, checks the last parameters, and loads the best ones."""
    if progress.best is not None and (why := processes.agreed(partial(checkpoint.damage, training.best))):
        log.warning("%s: the best weights from here on take their place", why)
        progress = trainer.validate(training, logger, progress._replace(best=None, best_step=None))
    progress = trainer.run(training, logger, progress)
    for name, parameter in training.meta_layer.named_parameters():
        if not torch.isfinite(parameter).all():  # the last step made it so: no later loss would show it
            why = f"{name} is not finite after step {progress.step}"
            raise FailedRun(f"{why}; the best weights so far are {training.best}")
    checkpoint.load_weights(training.best, training.meta_layer)
    return progress


def outcome(training: Training, trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """The record of a training, with the validation metrics of its best weights, which are loaded."""
    metrics, by_step = trainer.validation_of_best(training, progress)
    inner_steps = trainer.selecting_step(training.meta_layer)
    return {
        "step": progress.step,
        "seconds": progress.seconds,
        "monitor": trainer.monitor,
        "best": {"value": progress.best, "step": progress.best_step, "inner_steps": inner_steps},
        "batch_norm": training.meta_layer.batch_norm_policy,
        **training.outer.planner.plan_of(trainer.meta_batch)._asdict(),
        "parameters": sum(p.numel() for p in training.outer.learned.values()),
        "git": first_git_state(),
        "validation": {name: interval._asdict() for name, interval in metrics.items()},
        "validation_by_step": {n: [interval._asdict() for interval in rows] for n, rows in by_step.items()},
    }


def set_up(config: DictConfig, folder: RunFolder, kept: Mapping[str, Any] | None = None) -> Training:
    """Builds the parts of a training; draws and writes nothing.

    `kept` is what the task of a trained run kept of its data, which is then not read.
    """
    device = build.build_device(config.device)
    task = build.build_task(config)
    if kept:
        task.restore(kept)
    meta_layer = build.build_meta_layer(config, task).to(device)
    import_compiler()
    outer = build.build_outer_loop(config, meta_layer)
    generator = torch.Generator().manual_seed(config.seed)
    made = Training(task, meta_layer, outer, generator, device, folder.last, folder.best)
    return made._replace(check_folder=folder.check_held, record_step=folder.record_step)


def start(training: Training, config: DictConfig, folder: RunFolder, record: Callable[[], None]) -> Progress:
    """Restores the last checkpoint of a resumed run, or records the settings of a new one."""
    goes_on = processes.agreed(partial(recorded, config, folder, record))
    return checkpoint.restore(training) if goes_on else Progress()


def recorded(config: DictConfig, folder: RunFolder, record: Callable[[], None]) -> bool:
    """Whether there is a checkpoint to go on from, of which damaged ones are set aside; else settings are recorded."""
    folder.failed.unlink(missing_ok=True)
    if config.resume and last_checkpoints.kept(folder.last):
        last_checkpoints.set_damaged_aside(folder.last)
        return True
    if not config.resume:
        folder.check_new()  # another process may have finished a run here in the meantime
    record()
    return False


def evaluate(evaluation: Evaluation, config: DictConfig, training: Training, choices: Mapping[str, str]) -> Report:
    name = choices.get("algorithm", type(training.meta_layer).__name__)
    make = partial(make_base_layer, config, training)
    with stage("evaluating"):
        return evaluation.run(name, training.meta_layer, make, training.device, monitor=config.trainer.monitor)


def make_base_layer(config: DictConfig, training: Training) -> BaseLayer:
    """A newly initialised base layer, but for a frozen network, which has the weights that it came with."""
    with weights_follow():
        made = build.build_base_layer(config, training.task)
    if isinstance(made.features, InEvaluation) and made.features.frozen:
        made.features.load_state_dict(training.meta_layer.base_layer.features.state_dict())
    return made


def evaluate_run(
    folder: RunFolder, evaluation: DictConfig, *, weights: str, device: str, asked: Asked | None = None
) -> Report:
    """Evaluates the run in a folder, as composed from `conf/evaluation`, with its `best` or `last` weights.

    On other tasks than the run's own, baselines of the run that do not suit them are left out.
    """
    training, config = load_run(folder, weights=weights, device=device, asked=asked), folder.config()
    config.evaluation = evaluation
    task = on_features(training.task, training.meta_layer.base_layer)
    training.outer.prepare(task.sample(2, "test", torch.Generator().manual_seed(0)).to(training.device))
    built = build.build_evaluation(config)
    assert built is not None
    if asked is not None:
        built.baselines = without_misfits(built.baselines, training.task, key="evaluation.baseline")
    return evaluate(built, config, training, folder.choices())


def load_run(folder: RunFolder, *, weights: str, device: str, asked: Asked | None = None) -> Training:
    """The trained parts of the run in a folder, on its own tasks or on others; its data need not be there.

    Raises:
        UserError: the weights do not fit the tasks that are asked for.
    """
    config, home = folder.config(), folder.trained_in()
    if weights not in ("best", "last"):
        raise InvalidValue("weights", weights, "must be best or last")
    config.device, config.init = device, None
    check_importable(config, home)
    find_data(config, home)
    if asked is not None:
        check_divided_alike(config.task, asked.task)
        config.task, config.train_tasks = asked.task, None
    with weights_follow():
        training = set_up(config, folder, folder.kept() if asked is None else None)
    try:
        if weights == "best":
            checkpoint.load_weights(folder.best, training.meta_layer)
        else:
            checkpoint.restore(training)
    except checkpoint.OtherArchitecture as error:
        if asked is None:
            raise
        own, algorithm = build.build_task(folder.config()).spec, folder.choices().get("algorithm", "")
        raise UserError(refusal(asked.typed, algorithm, error.name, own, training.task.spec)) from error
    return training


def check_importable(config: DictConfig, home: Path | None) -> None:
    """Refuses a class of the user's own that cannot be imported from here."""
    for key, part in parts(config):
        try:
            located(part._target_)
        except Exception as error:  # importing a user's module may raise anything
            raise InvalidValue(f"{key}._target_", part._target_, not_imported(part._target_, error, home)) from error


def find_data(config: DictConfig, home: Path | None) -> None:
    """Makes relative paths of the task absolute where they lead to something from the folder of the training alone."""
    for key, value in leaves(cast(dict[str, Any], OmegaConf.to_container(config.task, resolve=True))):
        named = key.rpartition(".")[2] in ("path", "data_dir") and isinstance(value, str) and home is not None
        if named and not Path(value).exists() and (home / value).exists():
            OmegaConf.update(config.task, key, str(home / value))
