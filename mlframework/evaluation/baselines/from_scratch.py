"""The same network, trained on each support set alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mlframework.backend.forward import fork_rng
from mlframework.base_layers.base_layer import BaseLayer, InEvaluation, unfrozen
from mlframework.episode import Examples, Params
from mlframework.evaluation.choices import Candidate, Rule, Trial, thinned
from mlframework.evaluation.part import Baseline
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet, task_values
from mlframework.inner_loop import InnerUpdate
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.gradient_descent.meta_gradients import FirstOrder
from mlframework.meta_layers.meta_layer import Metrics
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FromScratch", "TrainedFromScratch"]


class FromScratch(Baseline):
    """The same network, trained on each support set from random parameters; rule, rate and steps are tuned.

    A frozen network that came trained stays as it is: then the head alone is trained.

    Args:
        tasks: the number of tasks on which it is judged, the first of the set, for training takes long; None: all.
        steps: training steps at most.
    """

    def __init__(self, *, tasks: int | None, steps: int) -> None:
        self.tasks = tasks if tasks is None else at_least("tasks", tasks, 1)
        self.steps = at_least("steps", steps, 1)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        choice = trial.choose(self.candidate(rule, trial) for rule in trial.rules)
        features = trial.meta_layer.base_layer.features
        keeps = isinstance(features, InEvaluation) and features.frozen
        name = "head from scratch" if keeps else "from scratch"
        yield trial.row(name, trial.shown("transductive"), choice, tasks=self.tasks)

    def candidate(self, rule: Rule, trial: Trial) -> Candidate:
        """Training by one rule; every rule starts from the same random parameters."""

        def judge(tasks: TaskSet) -> Metrics:
            with fork_rng(trial.device):
                torch.manual_seed(tasks.seed)
                scratch = TrainedFromScratch(trial.make_base_layer, trial.task, update=rule.update, steps=self.steps)
                for _ in range(tasks.start):  # networks of tasks that other ranks judge
                    trial.make_base_layer()
                scratch.engine = trial.meta_layer.engine
                return task_values(scratch.to(trial.device), tasks, self.steps, device=trial.device)

        return Candidate(judge, thinned(self.steps), rule=rule)


class TrainedFromScratch(MAML):
    """The same network, trained on each whole support set alone from a random initialisation of its own."""

    def __init__(
        self,
        make_base_layer: Callable[[], BaseLayer],
        task: TaskDistribution,
        *,
        update: Callable[[Params], InnerUpdate],
        steps: int,
    ) -> None:
        network = unfrozen(make_base_layer())  # all of it is trained, also what the algorithm freezes
        super().__init__(network, task, update=update, meta_gradient=FirstOrder(), inner_steps=steps)
        self.make_base_layer = make_base_layer

    def initial(self, support: Examples) -> Params:
        """Stacked parameters of one new network per task."""
        networks = [dict(self.make_base_layer().named_parameters()) for _ in range(len(support.mask))]
        return {
            name: torch.stack([network[name].detach() for network in networks]).to(support.mask.device)
            for name in self.adapted_names
        }

    def trajectory(self, support: Examples, steps: int, *, batch_size: int | None = None) -> Iterator[Params]:
        """Parameters after each of the `thinned` numbers of steps."""
        path, shown = super().trajectory(support, steps, batch_size=batch_size), set(thinned(steps))
        yield from (params for step, params in enumerate(path) if step in shown)
