"""A trained run beside conventional methods: on its own tasks, at other shots, and on other task distributions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from mlframework.errors import FailedRun, InvalidValue, UserError
from mlframework.evaluation.baselines.pretraining import AfterPretraining
from mlframework.evaluation.comparison import (
    ClockedTrial,
    Comparison,
    Cost,
    Crossing,
    crossing,
    differences_at,
    standings,
)
from mlframework.evaluation.evaluation import Evaluation
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs import build
from mlframework.runs.asked import asked_task
from mlframework.runs.contenders import without_misfits
from mlframework.runs.error_report import cause
from mlframework.runs.run import load_run, prepare_process
from mlframework.runs.run_folder import RunFolder
from mlframework.screen import stage
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["Compared", "Plan", "compare_run"]

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """The contenders and the tasks of a comparison, checked before anything is trained."""

    config: DictConfig  # of the run; its evaluation has the contenders as baselines
    evaluation: Evaluation
    contenders: dict[str, Baseline]
    shots: list[int]  # of the learning curves, besides the run's own
    few: tuple[int, int]  # test and validation tasks at each of them
    across: dict[str, TaskDistribution]  # other task distributions, by what the user typed

    @classmethod
    def of(cls, config: DictConfig, typed: DictConfig) -> Plan:
        """The plan for the config of a run; `typed` has the keys of the command, see conf/compare.yaml."""
        task, evaluation = build.build_task(config), build.build_evaluation(config)
        if evaluation is None:
            raise InvalidValue("evaluation", "none", "a comparison needs one: leave it out")
        few = tuple(at_least(f"curve.{name}", typed.curve[name], 1) for name in ("tasks", "validation_tasks"))
        shots = sorted({at_least("shots", k, 1) for k in typed.shots})
        named = typed.against is not None
        contenders = without_misfits(evaluation.baselines, task, key="against", named=named)
        across = {name: other_task(name, config, task) for name in typed.cross}
        return cls(config, evaluation, contenders, shots, few, across)


class Compared(NamedTuple):
    """The comparison on the run's own tasks, at other numbers of shots, and on other task distributions."""

    algorithm: str
    own: Comparison
    shots: int | None  # of the run's own tasks; None where their number is no setting, or varies
    curve: dict[int, Comparison]  # by shots, the run's own among them
    crossings: dict[str, Crossing]  # by method
    across: dict[str, Comparison]

    def to_json(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "own": self.own.to_json(),
            "shots": self.shots,
            "curve": {str(k): comparison.to_json() for k, comparison in self.curve.items()},
            "crossings": {method: found._asdict() for method, found in self.crossings.items()},
            "across": {name: comparison.to_json() for name, comparison in self.across.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Compared:
        return cls(
            content["algorithm"],
            Comparison.from_json(content["own"]),
            content["shots"],
            {int(k): Comparison.from_json(each) for k, each in content["curve"].items()},
            {method: Crossing(**each) for method, each in content["crossings"].items()},
            {name: Comparison.from_json(each) for name, each in content["across"].items()},
        )


def other_task(name: str, config: DictConfig, task: TaskDistribution) -> TaskDistribution:
    """Another task distribution, by its option or by overrides with spaces between; its spec must be the run's."""
    overrides = name.split() if "=" in name else [f"task={name}"]
    found = build.build_task(OmegaConf.create({"task": asked_task(config, None, overrides)}))
    same = found.spec._replace(ragged=task.spec.ragged)
    if same != task.spec:
        spec = task.spec
        theirs, ours = found.spec[:3], (spec.kind, spec.x_shape, spec.out_features)
        why = f"its spec is {theirs}, and the run has learned {ours}"
        raise InvalidValue("cross", name, f"{why}: add settings, as in 'cross=[\"task={name} task.n_way=5\"]'")
    return found


def compare_run(folder: RunFolder, plan: Plan, *, device: str) -> Compared:
    """Judges the run in a folder and its contenders on the same frozen tasks."""
    prepare_process(plan.config)
    training, name = load_run(folder, weights="best", device=device), folder.choices().get("algorithm")
    training.outer.prepare(training.task.sample(2, "test", torch.Generator().manual_seed(0)).to(training.device))
    own, others = training.task, tasks_by_shots(plan)
    jobs = 1 + len(others) + len(plan.across)
    with progress_bar(jobs * (1 + len(plan.contenders))) as advance:
        judge = Judge(
            name or type(training.meta_layer).__name__,
            training.meta_layer,
            plan,
            partial(build.build_base_layer, plan.config, own),
            training.device,
            folder.read_result().get("seconds") if folder.result.exists() else None,
            advance,
        )
        sizes = plan.evaluation.tasks, plan.evaluation.validation_tasks
        found = judge(own, "", sizes)
        shots = plan.config.task.get("k_shot")
        shots = shots if isinstance(shots, int) else None
        curve = {k: judge(task, f"{k} shots: ", plan.few) for k, task in others.items()}
        if shots is not None and curve:
            curve = dict(sorted({**curve, shots: found}.items()))
        across = {typed: judge(task, f"{typed}: ", sizes) for typed, task in plan.across.items()}
    return Compared(judge.name, found, shots, curve, crossings_of(curve), across)


class Judge(NamedTuple):
    """A trained algorithm and its contenders, ready to be judged on any tasks of the same spec."""

    name: str
    meta_layer: MetaLayer
    plan: Plan
    make_base_layer: Callable[[], Any]
    device: torch.device
    seconds: float | None  # of meta-training
    advance: Callable[[str], None]  # tells the progress bar which method comes next

    def __call__(self, task: TaskDistribution, where: str, sizes: tuple[int, int]) -> Comparison:
        """Judges every method on `sizes` test and validation tasks of a distribution."""
        evaluation, metric = self.plan.evaluation, self.plan.config.trainer.monitor
        tasks = TaskSet(task, evaluation.split, tasks=sizes[0], seed=evaluation.seed, chunk=evaluation.chunk)
        validation = TaskSet(task, "validation", tasks=sizes[1], seed=VALIDATION_SEED, chunk=evaluation.chunk)
        with on_task(self.meta_layer, task):
            trial = ClockedTrial(
                *(self.meta_layer, self.make_base_layer, tasks, tasks.sources(), validation),
                *(evaluation.rules, metric, self.device),
            )
            self.advance(f"{where}{self.name}")
            rows, _ = evaluation.algorithm(self.name, trial)
            costs = [Cost(self.seconds, trial.tuning, trial.adapting[row.method, row.batch_norm]) for row in rows]
            count = len(rows)
            for key, baseline in self.plan.contenders.items():
                self.advance(f"{where}{key}")
                for row, cost in judged(key, baseline, trial):
                    rows.append(row)
                    costs.append(cost)
        if not all(metric in row.metrics for row in rows):
            metric = "query_loss"  # which all methods have
        higher = metric.removeprefix("query_") in task.higher_is_better
        more = {"metric": metric, "higher_is_better": higher, "sources": trial.sources}
        found = standings(rows, costs, algorithm_rows=count, **more)
        drawn = tasks.hash(), tasks.split, tasks.tasks, tasks.seed, validation.tasks
        return Comparison(*drawn, standings=found, **more)


def judged(key: str, baseline: Baseline, trial: ClockedTrial) -> Iterator[tuple[MethodResult, Cost]]:
    """The rows of a contender with their costs; one that fails on these tasks is left out with a warning."""
    try:
        for row in baseline.rows(key, trial):
            seconds = baseline.training_seconds(trial) if isinstance(baseline, AfterPretraining) else None
            yield row, Cost(seconds, trial.tuning, trial.adapting[row.method, row.batch_norm])
    except (UserError, FailedRun) as error:
        log.warning("%s is left out: %s", key, error)


@contextmanager
def on_task(meta_layer: MetaLayer, task: TaskDistribution) -> Iterator[None]:
    """Lets an algorithm judge another distribution of the same spec for a while."""
    own = meta_layer.task
    meta_layer.task = task
    try:
        yield
    finally:
        meta_layer.task = own


def tasks_by_shots(plan: Plan) -> dict[int, TaskDistribution]:
    """The run's tasks with other numbers of shots, as far as there are examples enough; a line names the others."""
    if not plan.shots:
        return {}
    if not isinstance(plan.config.task.get("k_shot"), int):
        log.info("no learning curve: the task has no single number of shots (task.k_shot)")
        return {}
    found, refused = {}, []
    for shots in plan.shots:
        if shots == plan.config.task.k_shot:
            continue
        try:
            config = plan.config.copy()
            config.task.k_shot = shots
            task = build.build_task(config)
            for split in ("validation", plan.evaluation.split):
                task.sample(1, split, torch.Generator().manual_seed(0))
            found[shots] = task
        except (UserError, InstantiationException) as error:
            root = cause(error)
            if not isinstance(root, UserError):
                raise
            refused.append(shots)
            why = str(root)
    if refused:
        log.info("no learning curve at %s shots: %s", ", ".join(map(str, refused)), why)
    return found


def crossings_of(curve: Mapping[int, Comparison]) -> dict[str, Crossing]:
    """Where each method's learning curve reaches the algorithm's, for methods with at least two points."""
    methods = dict.fromkeys(each.row.method for found in curve.values() for each in found.standings if each.verdict)
    crossings = {}
    for method in methods:
        at = differences_at(curve, method)
        if len(at) > 1:
            higher = next(iter(curve.values())).higher_is_better
            crossings[method] = crossing(list(at), list(at.values()), higher_is_better=higher)
    return crossings


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A stage over methods; the function that it gives ends one and names the next."""
    with stage("comparing", total, -1) as at:

        def advance(now: str) -> None:
            at.done, at.note = at.done + 1, now

        yield advance
