"""A network trained conventionally on the training tasks, then fine-tuned on each support set."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from mlframework.episode import Examples, Params
from mlframework.evaluation.baselines.pretraining import AfterPretraining, PretrainedNetwork, Pretraining
from mlframework.evaluation.choices import Candidate, Rule, Trial, thinned
from mlframework.evaluation.report import MethodResult
from mlframework.evaluation.task_set import TaskSet, task_values
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.gradient_descent.maml import MAML
from mlframework.meta_layers.gradient_descent.meta_gradients import FirstOrder
from mlframework.meta_layers.meta_layer import Metrics

__all__ = ["FineTuned", "fine_tuned"]


class FineTuned(AfterPretraining):
    """All parameters of a conventionally trained network, fine-tuned on each support set.

    Validation tasks choose the network, the rule, the rate, and the number of steps.

    Args:
        tasks: the number of test tasks on which it is judged, the first of the set; None: all.
        steps: steps of fine-tuning, at most.
        pretraining: how the network was trained.
    """

    def __init__(self, *, tasks: int | None, steps: int, pretraining: Pretraining) -> None:
        super().__init__(pretraining)
        self.tasks = tasks if tasks is None else at_least("tasks", tasks, 1)
        self.steps = at_least("steps", steps, 1)

    def rows(self, name: str, trial: Trial) -> Iterator[MethodResult]:
        networks = self.pretraining.networks(trial)
        choice = trial.choose(
            fine_tuned(network, rule, trial, steps=self.steps, adapts=".")
            for network in networks
            for rule in trial.rules
        )
        yield trial.row("fine-tuning", trial.shown(trial.meta_layer.batch_norm), choice, tasks=self.tasks)


class ThinlyJudged(MAML):
    """Gradient steps that are judged after the `thinned` numbers of them alone."""

    def trajectory(self, support: Examples, steps: int, *, batch_size: int | None = None) -> Iterator[Params]:
        path, shown = super().trajectory(support, steps, batch_size=batch_size), set(thinned(steps))
        yield from (params for step, params in enumerate(path) if step in shown)


def fine_tuned(network: PretrainedNetwork, rule: Rule, trial: Trial, *, steps: int, adapts: str) -> Candidate:
    """Fine-tuning by one rule of the parameters that a regular expression finds."""

    def judge(tasks: TaskSet) -> Metrics:
        layer = ThinlyJudged(
            copy.deepcopy(network.base_layer),
            tasks.task,
            update=rule.update,
            meta_gradient=FirstOrder(),
            inner_steps=steps,
            adapts=adapts,
            batch_norm=trial.meta_layer.batch_norm,
        )
        layer.engine = trial.meta_layer.engine
        return task_values(layer, tasks, steps, device=trial.device)

    return Candidate(judge, thinned(steps), f"{rule}, {network.named}")
