"""A search by Optuna, whose study is a file: it goes on where it stopped, and several processes share it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mlframework.errors import InvalidValue, UserError
from mlframework.files import write_text
from mlframework.runs.launchers.launcher import require
from mlframework.runs.overrides import override_values, plain
from mlframework.runs.run_folder import locked_file
from mlframework.runs.sweep_table import JobRow, read_rows

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

__all__ = ["OptunaSweeper"]

#: The folder of locks within the sweep's: one for the study, one for each trial, which its process holds.
LOCKS = ".search"

#: Types of choices that Optuna keeps as they are, beside None; it keeps others as they are typed.
PLAIN = (str, int, float)


class Space(NamedTuple):
    """What a search is over.

    Attributes:
        distributions: of each searched key.
        texts: how each choice of a key is typed.
        fixed: the other overrides.
    """

    distributions: dict[str, BaseDistribution]
    texts: dict[str, dict[Any, str]]
    fixed: list[str]

    def overrides(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The overrides of a trial."""
        chosen = {name: self.texts.get(name, {}).get(value, str(value)) for name, value in params.items()}
        return (*self.fixed, *(f"{name}={value}" for name, value in chosen.items()))

    def params(self, row: JobRow) -> dict[str, Any] | None:
        """The parameters of a job that was run before; None if it lies outside of the space."""
        settings = override_values(f"{key}={value}" for key, value in row.overrides.items())
        params = {name: settings.pop(name, None) for name in self.distributions}
        for name, texts in self.texts.items():
            if params[name] not in texts:
                return None
        return params if settings == override_values(self.fixed) else None

    def digest(self) -> str:
        """Eight hexadecimal digits that equal spaces share."""
        content = [repr(sorted(self.distributions.items())), sorted(override_values(self.fixed).items())]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]


class Trial(NamedTuple):
    """A trial of the study that this process runs; the lock tells others that it is being run."""

    number: int
    overrides: tuple[str, ...]
    lock: IO[str]


class OptunaSweeper(Sweeper):
    """Asks a study for trials and runs them as jobs, until it has `n_trials` that finished or failed.

    Processes with the same sweep folder share the study. A trial whose process was killed is run to its end. Another
    search space in the same folder is another study, which begins with the jobs that were run before.

    Args:
        direction: `minimize` or `maximize`.
        n_trials: of the study, whoever runs them.
        n_jobs: trials that this process proposes at once.
        storage: the file of the study, or the URL of a data base.
        sampler: the config of Optuna's sampler. With a seed, trial n is drawn from the seed plus n: a search that was
            stopped proposes what it would have proposed, and two processes propose different trials.
        params: the search space, as on the command line.
    """

    def __init__(
        self, direction: str, n_trials: int, n_jobs: int, storage: str, sampler: Any, params: Mapping[str, Any] | None
    ) -> None:
        for name, value in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if not (isinstance(value, int) and value >= 1):
                raise InvalidValue(name, value, "must be a whole number of at least 1")
        self.direction: Any = direction
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.storage, self.sampler, self.given = storage, sampler, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        for package in ("optuna", "optuna.storages.journal"):  # versions below 4 lack the second
            require(package, "sweep=optuna", "sweep")
        self.sampler = instantiate(self.sampler)
        self.loader, self.folder = hydra_context.config_loader, Path(config.hydra.sweep.dir)
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = self.space([*(f"{key}={value}" for key, value in self.given.items()), *arguments])
        self.folder.mkdir(parents=True, exist_ok=True)
        study, launched = self.study(space), 0
        while trials := self.next_trials(study, space):
            returns = self.launcher.launch([trial.overrides for trial in trials], initial_job_idx=launched)
            launched += len(trials)
            for trial, result in zip(trials, returns, strict=True):
                self.tell(study, trial, result.return_value)
        self.conclude(study)

    def space(self, typed: Sequence[str]) -> Space:
        """The search space and the fixed settings; of two settings of one key the last counts."""
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(list(typed))
        by_key = {override.get_key_element(): override for override in overrides}
        space = Space({}, {}, [])
        for key, override in by_key.items():
            if override.is_sweep_override():
                space.distributions[key], texts = distribution(override)
                space.texts.update({key: texts} if texts else {})
            else:
                space.fixed.append(f"{key}={override.get_value_element_as_str()}")
        if not space.distributions:
            raise UserError("sweep=optuna: nothing to search: give a key several values, as in optimizer.lr=1e-3,1e-2")
        return space

    def study(self, space: Space) -> Study:
        """The study of a space; a new one begins with the jobs of the folder that lie within the space."""
        import optuna

        with self.locked():
            storage: Any = self.storage
            if "://" not in self.storage:
                from optuna.storages.journal import JournalFileBackend

                storage = optuna.storages.JournalStorage(JournalFileBackend(self.storage))
            name = f"search-{space.digest()}-{self.direction}"
            new = name not in optuna.get_all_study_names(storage)
            study = optuna.create_study(study_name=name, storage=storage, direction=self.direction, load_if_exists=True)
            for row in read_rows(self.folder) if new and not self.on_grid else ():
                take_over(study, space, row)
        return study

    def next_trials(self, study: Study, space: Space) -> list[Trial]:
        """Trials for this process: those that a killed process left, then new ones, as many as the study lacks."""
        from optuna.trial import TrialState

        found: list[Trial] = []
        with self.locked():
            names = space.distributions.keys()  # a process that was killed while it asked leaves a trial without some
            trials = [trial for trial in study.get_trials(deepcopy=False) if trial.params.keys() == names]
            count = sum(trial.state.is_finished() or trial.state == TrialState.RUNNING for trial in trials)
            for trial in trials:
                if trial.state == TrialState.RUNNING and len(found) < self.n_jobs:
                    found += self.claimed(trial.number, space.overrides(trial.params))
            most = min(self.n_trials, grid_size(space)) if self.on_grid else self.n_trials
            for number in range(count, min(most, count + self.n_jobs - len(found))):
                study.sampler = self.made_sampler(space, number)
                asked = study.ask(fixed_distributions=space.distributions)
                found += self.claimed(asked.number, space.overrides(asked.params))
        return found

    def locked(self) -> IO[str]:
        """Keeps other searches of this folder out while trials are given out."""
        (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
        lock = locked_file(self.folder / LOCKS / "study", wait=True)
        assert lock is not None
        return lock

    def claimed(self, number: int, overrides: tuple[str, ...]) -> list[Trial]:
        """The trial with its lock; none if another process runs it."""
        lock = locked_file(self.folder / LOCKS / str(number))
        return [Trial(number, overrides, lock)] if lock else []

    @property
    def on_grid(self) -> bool:
        """Whether the sampler takes all combinations, one after another."""
        return isinstance(self.sampler, partial) and self.sampler.func.__name__ == "GridSampler"

    def made_sampler(self, space: Space, number: int) -> Any:
        """The sampler of a trial."""
        if not isinstance(self.sampler, partial):
            return self.sampler
        seed = self.sampler.keywords.get("seed")
        if self.on_grid:
            return self.sampler({name: grid_values(name, each) for name, each in space.distributions.items()})
        return self.sampler(**({} if seed is None else {"seed": seed + number}))

    def tell(self, study: Study, trial: Trial, value: float | None) -> None:
        """Tells the study what a trial came to."""
        import optuna

        study.sampler = optuna.samplers.RandomSampler()  # the grid's would stop an optimisation, and there is none
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        study.tell(trial.number, value, state=state, skip_if_finished=True)
        trial.lock.close()

    def conclude(self, study: Study) -> None:
        """Prints the best parameters, and writes them to `optimization_results.yaml`."""
        try:
            best = study.best_trial
        except ValueError:
            print("no trial has finished")
            return
        found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
        write_text(self.folder / "optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(found)))
        print(f"Best parameters: {best.params}")
        print(f"Best value: {best.value}")


def take_over(study: Study, space: Space, row: JobRow) -> None:
    """Adds a job that was run before to a new study; one that came to no end is tried first."""
    from optuna.trial import TrialState, create_trial

    params = space.params(row)
    if params is None:
        return
    ended = row.status in ("finished", "diverged")
    state = TrialState.COMPLETE if row.status == "finished" and row.validation is not None else TrialState.FAIL
    value = row.validation if state == TrialState.COMPLETE else None
    with suppress(ValueError, TypeError):  # a number outside of its interval
        trial = create_trial(state=state, value=value, params=params, distributions=space.distributions)
        study.add_trial(trial) if ended else study.enqueue_trial(params)


def distribution(override: Override) -> tuple[BaseDistribution, dict[Any, str]]:
    """The distribution of a key that is searched, and how each choice is typed; an interval has no choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags), {}
    values, texts = [plain(each) for each in override.sweep_iterator()], list(override.sweep_string_iterator())
    if isinstance(value, RangeSweep) and not value.shuffle and all(type(each) is int for each in values):
        step = abs(values[1] - values[0]) if len(values) > 1 else 1
        return IntDistribution(min(values), max(values), step=step), {}
    pairs = list(zip(values, texts, strict=True))
    choices = [each if each is None or isinstance(each, PLAIN) else text for each, text in pairs]
    return CategoricalDistribution(choices), dict(zip(choices, texts, strict=True))


def grid_values(name: str, found: BaseDistribution) -> list[Any]:
    """All values of a distribution; an interval of fractions has none."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(found, CategoricalDistribution):
        return list(found.choices)
    if isinstance(found, IntDistribution) and not found.log:
        return list(range(found.low, found.high + 1, found.step))
    raise UserError(f"{name}: a grid needs choices, as in {name}=1,2,5: an interval has none")


def grid_size(space: Space) -> int:
    return math.prod(len(grid_values(name, each)) for name, each in space.distributions.items())
