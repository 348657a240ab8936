"""Meta-training: outer steps, validation, checkpoints, curves."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from mlframework import processes
from mlframework.errors import FailedRun, InvalidValue, nearest
from mlframework.evaluation.interval import Interval
from mlframework.evaluation.number_format import shown
from mlframework.evaluation.part import Validated
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet, over_ranks, task_values
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.screen import Stage, stage
from mlframework.tasks.on_features import on_features
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training import checkpoint
from mlframework.training.checkpoint import Progress, Training
from mlframework.training.interrupt import DeferredInterrupt, stopped_by
from mlframework.training.logger import Logger
from mlframework.training.outer_loop import NotFinite

__all__ = ["Trainer"]

log = logging.getLogger(__name__)

#: The metrics after the inner steps that select weights, and after 0, 1, ... inner steps.
Validation = tuple[dict[str, Interval], dict[str, list[Interval]]]

#: The first validation tasks, which displays show.
SHOWN_TASKS = 4


@dataclass(kw_only=True)
class Trainer:
    """Runs the outer loop for a number of steps.

    Args:
        steps: outer steps.
        meta_batch: tasks per outer step.
        validate_every: outer steps between validations; the last step is always validated.
        validation_tasks: tasks of the frozen validation set.
        checkpoint_every: outer steps between checkpoints; a resumed run continues at the last one.
        checkpoint_minutes: minutes after which there is a checkpoint in any case; None: the number of steps decides.
        keep_checkpoints: the last checkpoints that are kept; if the newest is damaged, the one before takes its place.
        log_every: outer steps between points of the training curves.
        monitor: the validation metric that selects the best checkpoint.
        monitor_step: inner steps after which it is taken; None takes the number that is trained, or the last one if
            validation takes fewer.
    """

    steps: int
    meta_batch: int
    validate_every: int
    validation_tasks: int
    checkpoint_every: int
    log_every: int
    monitor: str
    monitor_step: int | None = None
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        at_least_one = ("steps", "meta_batch", "validate_every", "validation_tasks", "checkpoint_every", "log_every")
        for field in (*at_least_one, "keep_checkpoints"):
            at_least(field, getattr(self, field), 1)
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            why = "must be above 0, or null for checkpoints by checkpoint_every alone"
            raise InvalidValue("checkpoint_minutes", self.checkpoint_minutes, why)
        if self.monitor_step is not None and self.monitor_step < 0:
            why = "must be at least 0, or null for the steps that are trained"
            raise InvalidValue("monitor_step", self.monitor_step, why)
        self.validated: tuple[int, Validation] | None = None  # the last validation, and its outer step

    def run(self, training: Training, logger: Logger, progress: Progress) -> Progress:
        """Trains from where `progress` stands to the last step; where there is nothing to learn, only validates.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, or another signal came; the steps done are in a checkpoint,
                unless a compiler was at work.
            OSError: a file cannot be written, or the run folder is gone.
            FailedRun: a loss was not finite, or the monitored metric was not finite at any validation.
        """
        if progress.step == 0:
            self.save(training, progress)
        if not training.outer.learned:
            log.info("nothing to learn: no outer step is taken")
            return self.without_steps(training, logger, progress)
        with stage("meta-training", self.steps, progress.step) as training_stage, DeferredInterrupt() as interrupt:
            training.outer.capture.interrupted = lambda: bool(interrupt.asked)
            clock = resumed = saved = time.perf_counter()
            spent, reported = progress.seconds, progress.step
            for step in range(progress.step + 1, self.steps + 1):
                training.outer.notes = bool(interrupt.asked), self.overdue(saved)
                metrics = self.outer_step(training, step)
                training_stage.done = step
                if step % self.log_every == 0 or step == self.steps:
                    rate = self.meta_batch * (step - reported) / (time.perf_counter() - clock)
                    self.tell(metrics, logger, training_stage, step, rate)
                    clock, reported = time.perf_counter(), step
                progress = progress._replace(step=step, seconds=spent + time.perf_counter() - resumed)
                if step % self.validate_every == 0 or step == self.steps:
                    progress = self.validate(training, logger, progress)
                    clock, reported = time.perf_counter(), step
                interrupted, due = self.wishes(training, interrupt.asked, saved)
                if step % self.checkpoint_every == 0 or step == self.steps or interrupted or due:
                    logger.flush()  # a resumed run does not take the steps before its checkpoint again
                    self.save(training, progress)
                    saved = time.perf_counter()
                if interrupted:
                    raise stopped_by(interrupted)
        if interrupt.asked:  # after the last step
            raise stopped_by(interrupt.asked)
        if progress.best is None:
            after = f"inner steps: {self.selecting_step(training.meta_layer)}"
            why = f"{self.monitor} ({after}) was not finite at any validation, so no weights are the best"
            raise FailedRun(f"{why}; the last ones are in {training.last}")
        return progress

    def overdue(self, saved: float) -> bool:
        """Whether the last checkpoint is older than `checkpoint_minutes`, by the clock of rank 0."""
        minutes = (time.perf_counter() - saved) / 60
        return self.checkpoint_minutes is not None and processes.leads() and minutes > self.checkpoint_minutes

    def wishes(self, training: Training, asked: int, saved: float) -> tuple[int, bool]:
        """The signal to stop for, or 0, and whether to save; ranks were told before the step."""
        if processes.count() == 1:
            return asked, self.overdue(saved)
        stop, due = training.outer.heard
        return (asked or signal.SIGTERM) if stop else 0, bool(due)

    def without_steps(self, training: Training, logger: Logger, progress: Progress) -> Progress:
        """The validation of an algorithm that has nothing to learn; its weights are the best ones."""
        progress = self.validate(training, logger, progress)
        self.save(training, progress)
        if progress.best is None:
            raise FailedRun(f"{self.monitor} is not finite on the validation tasks")
        return progress

    def selecting_step(self, meta_layer: MetaLayer) -> int:
        """The number of inner steps after which the monitored metric selects weights."""
        if self.monitor_step is None:
            return min(meta_layer.trained_inner_steps, meta_layer.test_inner_steps)
        return self.monitor_step

    def check(self, meta_layer: MetaLayer, metrics: Collection[str]) -> None:
        """Refuses to monitor an inner step that validation does not take, or a metric that does not exist."""
        if self.meta_batch < processes.count():
            why = (
                f"must be at least {processes.count()}, the number of processes, each of which takes some of the tasks"
            )
            raise InvalidValue("meta_batch", self.meta_batch, why)
        most = meta_layer.test_inner_steps
        if self.monitor_step is not None and self.monitor_step > most:
            why = f"must be at most {most}, the inner steps of validation (algorithm.test_inner_steps)"
            raise InvalidValue("monitor_step", self.monitor_step, why if most else "must be null: nothing is stepped")
        if self.monitor not in metrics:
            why = f"must be one of {', '.join(metrics)}{nearest(self.monitor, metrics)}"
            raise InvalidValue("monitor", self.monitor, why)

    def outer_step(self, training: Training, step: int) -> Metrics:
        """Steps on the next meta-batch; where the loss is not finite, says which step and which tasks."""
        task = on_features(training.task, training.meta_layer.base_layer)
        episode = task.sample(self.meta_batch, "train", training.generator)
        episode = training.meta_layer.before_step(episode, training.generator)
        # Each rank draws the whole meta-batch, so that the tasks are the same whatever the number of ranks.
        mine = episode.tasks(processes.share(self.meta_batch)) if processes.count() > 1 else episode
        training.outer.capture.steps_left = self.steps - step
        try:
            return training.outer.step(mine.to(training.device), self.meta_batch)
        except NotFinite as error:
            hashes = [f"task {episode.tasks(slice(i, i + 1)).hash()}" for i in error.tasks[:3]]
            more = [f"and {len(error.tasks) - 3} more"] if error.tasks[3:] else []
            who = ", ".join([*hashes, *more]) or f"meta-batch {episode.hash()}"
            why = f"{error} ({who}); the last good checkpoint is {training.last}"
            raise FailedRun(f"step {step}: {why}") from error

    def tell(self, metrics: Metrics, logger: Logger, at: Stage, step: int, rate: float) -> None:
        """A point of each training curve, and the note on the screen, which tell the tasks per second as well."""
        values = {f"train/{name}": value.item() for name, value in metrics.items()}
        values["train/tasks_per_second"] = rate
        logger.scalars(values, step)
        at.note = f"query loss {shown(values['train/query_loss'])}, {shown(rate)} tasks/s"

    def validate(self, training: Training, logger: Logger, progress: Progress) -> Progress:
        """Judges the frozen validation tasks, logs the curves over inner steps, keeps the best weights."""
        metrics, by_step = self.validation(training)
        self.validated = progress.step, (metrics, by_step)
        logger.intervals("validation", metrics, progress.step)
        logger.by_step("validation", by_step, progress.step)
        # Diagnostics of an algorithm, such as a solver's residual, are curves only.
        shown = {name: steps for name, steps in by_step.items() if name.startswith("query_")}
        count, rest = divmod(progress.step, self.validate_every)
        doubled = rest == 0 and count & (count - 1) == 0  # 1, 2, 4, 8, ...: things change early, then slowly
        if logger.figures and processes.leads() and (doubled or progress.step == self.steps):
            self.show(training, logger, shown, progress.step)
        said = ", ".join(f"{name} {metrics[name]}" for name in shown)
        log.info("step %d: validation %s", progress.step, said)
        value = metrics[self.monitor].mean
        if not self.better(training.task, value, progress.best):
            return progress
        if processes.leads():
            training.check_folder()
            checkpoint.save_weights(training.best, training.meta_layer)
        return progress._replace(best=value, best_step=progress.step)

    def validation_of_best(self, training: Training, progress: Progress) -> Validation:
        """The validation of the best weights, which are loaded: that of the last step, if it was the best."""
        if self.validated is not None and self.validated[0] == progress.best_step:
            return self.validated[1]
        return self.validation(training)

    def validation(self, training: Training) -> Validation:
        """The metrics of the frozen validation tasks after the inner steps that select weights, and after 0, 1, ..."""
        layer = training.meta_layer
        tasks = TaskSet(training.task, "validation", tasks=self.validation_tasks, seed=VALIDATION_SEED)
        with stage("validating"):
            judge = partial(task_values, layer, steps=layer.test_inner_steps, device=training.device)
            values = over_ranks(judge, tasks)
        by_step = {name: [Interval.of(row) for row in rows] for name, rows in values.items()}
        inner_steps = self.selecting_step(layer)
        # An algorithm without inner steps has one row.
        return {name: rows[min(inner_steps, len(rows) - 1)] for name, rows in by_step.items()}, by_step

    def show(self, training: Training, logger: Logger, by_step: Mapping[str, list[Interval]], step: int) -> None:
        """Lets the displays show a validation; one that fails is left out, for no figure is worth a training."""
        episode = next(iter(TaskSet(training.task, "validation", tasks=SHOWN_TASKS, seed=VALIDATION_SEED)))
        validated = Validated(training.meta_layer, episode.to(training.device), by_step, step)
        for name, display in training.displays.items():
            try:
                with stage(f"drawing {name}"):
                    display.show(validated, logger)
            except Exception as error:  # whatever a user's own display may raise
                log.warning("display.%s is left out at step %d: %s: %s", name, step, type(error).__name__, error)

    def better(self, task: TaskDistribution, value: float, than: float | None) -> bool:
        """True if a monitored value replaces the best so far; the first finite value always does."""
        if not math.isfinite(value):
            return False
        higher = self.monitor.removeprefix("query_") in task.higher_is_better
        return than is None or (value > than if higher else value < than)

    def save(self, training: Training, progress: Progress) -> None:
        checkpoint.save_training(training, progress, keep=self.keep_checkpoints)
