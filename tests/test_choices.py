"""Choices: on validation tasks, by the same rules for every method."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from mlframework.base_layers import MLP
from mlframework.errors import FailedRun
from mlframework.evaluation.baselines.from_scratch import FromScratch
from mlframework.evaluation.baselines.scikit_learn import (
    FittedEstimators,
    ScikitLearn,
    default_estimator,
    grid,
    raw_inputs,
)
from mlframework.evaluation.choices import Candidate, Rule, Trial, following
from mlframework.evaluation.evaluation import Evaluation
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet, task_values
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, DeepKernel, Exact, Joint
from mlframework.meta_layers.svm.kernels import LinearKernel
from mlframework.runs.tables import show_report
from mlframework.tasks import Sinusoid

CPU = torch.device("cpu")
CONVENTIONAL = {"from_scratch": FromScratch(tasks=2, steps=5), "scikit_learn": ScikitLearn()}


def trial(*, higher_is_better: bool) -> Trial:
    """A trial in which more query loss is better, or less."""
    task = Sinusoid()
    task.higher_is_better = frozenset({"loss"} if higher_is_better else ())
    validation = TaskSet(task, "validation", tasks=2, seed=0)
    return Trial(None, None, validation, None, validation, [], "query_loss", CPU)


def candidate(name: str, *means: float) -> Candidate:
    """A setting with these means after 0, 1, ... steps."""
    values = torch.tensor(means)[:, None].expand(-1, 2)
    return Candidate(lambda tasks: {"query_loss": values}, range(len(means)), name)


def test_the_best_setting_is_taken_at_its_best_number_of_steps():
    settings = [candidate("a", 3.0, 2.0, 2.5), candidate("b", 3.0, 2.6, 1.5, 4.0)]
    lowest = trial(higher_is_better=False).choose(settings)
    assert (lowest.candidate.setting, lowest.steps, lowest.value) == ("b", 2, 1.5)
    highest = trial(higher_is_better=True).choose(settings)
    assert (highest.candidate.setting, highest.steps, highest.value) == ("b", 3, 4.0)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_what_is_not_finite_is_never_the_best(higher_is_better: bool):
    settings = [candidate("a", math.nan, math.inf), candidate("b", -math.inf, 7.0), candidate("c", math.nan)]
    found = trial(higher_is_better=higher_is_better).choose(settings)
    assert (found.candidate.setting, found.value) == ("b", 7.0)
    with pytest.raises(FailedRun, match="no setting has a finite query_loss on the validation tasks"):
        trial(higher_is_better=higher_is_better).choose(settings[:1])


class Noted(Sinusoid):
    """Sinusoids that remember from which splits episodes were drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[str] = []

    def sample(self, num_tasks, split, generator):
        self.drawn.append(split)
        return super().sample(num_tasks, split, generator)


def layer_of(task: Sinusoid, meta_gradient) -> MAML:
    torch.manual_seed(0)
    network = MLP(task.spec, hidden=[8])
    return MAML(network, task, update=functools.partial(SGD, lr=0.001), meta_gradient=meta_gradient, inner_steps=3)


def test_test_tasks_choose_nothing():
    """Other test tasks, whatever they are, leave all choices as they were."""
    task, layer = Sinusoid(), layer_of(Sinusoid(), Joint())
    reports = [
        Evaluation(tasks=4, seed=seed, validation_tasks=6, baseline=CONVENTIONAL).run(
            "joint", layer, lambda: MLP(task.spec, hidden=[8]), CPU
        )
        for seed in (0, 1)
    ]
    assert reports[0].task_hash != reports[1].task_hash
    choices = [[(row.method, row.setting, row.chosen) for row in report.rows] for report in reports]
    assert choices[0] == choices[1]
    assert [row.setting for row in reports[0].rows][1:] != ["", ""]


def test_choices_are_made_on_validation_tasks_before_the_test_tasks_are_drawn():
    task = Noted()
    evaluation = Evaluation(tasks=4, seed=0, validation_tasks=6, baseline=CONVENTIONAL)
    evaluation.run("maml", layer_of(task, Exact()), lambda: MLP(task.spec), CPU)
    assert set(task.drawn) == {"validation", "test"}
    assert task.drawn.count("validation") >= 6


def test_a_baseline_without_a_variance_chooses_by_its_loss_where_a_likelihood_is_monitored(capsys):
    task = Sinusoid()
    layer = DeepKernel(MLP(task.spec, hidden=[8]), task, kernel=LinearKernel())
    evaluation = Evaluation(tasks=4, seed=0, validation_tasks=6, baseline=CONVENTIONAL)
    reports = {
        monitor: evaluation.run("deep_kernel", layer, lambda: MLP(task.spec, hidden=[8]), CPU, monitor=monitor)
        for monitor in ("query_nll", "query_loss")
    }
    by_nll, by_loss = ([row[1:] for row in report.rows[1:]] for report in reports.values())
    assert by_nll == by_loss
    assert "query_nll" in reports["query_nll"].rows[0].metrics
    show_report(reports["query_nll"], "query_nll")
    screen = capsys.readouterr().out
    assert "query nll on" in screen
    assert "from scratch" in screen.partition("query loss on")[2]


def test_fine_tuning_of_the_joint_network_is_tuned_over_rules_and_rates():
    """By hand: every rule in its own loop; the best of them on validation tasks is what the row reports."""
    task = Sinusoid()
    layer = layer_of(task, Joint())
    evaluation = Evaluation(tasks=5, seed=0, validation_tasks=7)
    row = evaluation.run("joint", layer, lambda: MLP(task.spec), CPU).rows[0]
    validation = TaskSet(task, "validation", tasks=7, seed=VALIDATION_SEED)
    by_rule = {"": task_values(layer, validation, 3, device=CPU)["query_loss"].mean(1)}
    for name, lr in (("Adam", 0.001), ("Adam", 0.01), ("Adam", 0.1), ("SGD", 0.01), ("SGD", 0.1)):
        with following(layer, Rule(name, lr)):
            by_rule[f"{name} {lr:g}"] = task_values(layer, validation, 3, device=CPU)["query_loss"].mean(1)
    best = min(by_rule, key=lambda setting: by_rule[setting].min().item())
    assert row.setting == best != ""
    assert row.chosen == by_rule[best].argmin()
    assert row.validation == pytest.approx(by_rule[best].min().item(), rel=1e-5)


def test_another_rule_is_followed_and_then_given_back():
    task = Sinusoid()
    layer, own = layer_of(task, Exact()), SGD
    same = MAML(layer.base_layer, task, update=functools.partial(SGD, lr=0.3), meta_gradient=Exact(), inner_steps=3)
    tasks = TaskSet(task, "test", tasks=3, seed=0)
    with following(layer, Rule("SGD", 0.3)):
        found = task_values(layer, tasks, 3, device=CPU)["query_loss"]
    assert torch.equal(found, task_values(same, tasks, 3, device=CPU)["query_loss"])
    assert isinstance(layer.update, own) and layer.update.lr == 0.001


def test_an_algorithm_that_learned_its_rule_keeps_it_unless_asked():
    task = Sinusoid()
    layer = layer_of(task, Exact())
    asked = [Evaluation(tasks=3, seed=0, validation_tasks=3, tune_rule=tune) for tune in (None, True)]
    settings = [each.run("maml", layer, lambda: MLP(task.spec), CPU).rows[0].setting for each in asked]
    assert settings[0] == "" != settings[1]


def test_the_scikit_learn_row_has_the_setting_that_is_best_on_validation_tasks():
    task = Sinusoid()
    layer = layer_of(task, Exact())
    evaluation = Evaluation(tasks=10, seed=0, validation_tasks=20, baseline={"scikit_learn": ScikitLearn()})
    row = evaluation.run("maml", layer, lambda: None, CPU).rows[1]
    validation = TaskSet(task, "validation", tasks=20, seed=VALIDATION_SEED)
    losses = {}
    for setting, estimator in grid(default_estimator("regression")):
        fitted = FittedEstimators(raw_inputs(), task, estimator=estimator)
        losses[setting] = task_values(fitted, validation, 0, device=CPU)["query_loss"].mean().item()
    assert len(losses) == 88
    assert row.setting == min(losses, key=lambda setting: losses[setting])


def test_a_difference_is_paired():
    """The interval of the differences of tasks, not of two means."""
    task = Sinusoid()
    layer = layer_of(task, Exact())
    evaluation = Evaluation(tasks=40, seed=0, validation_tasks=5, baseline={"scratch": FromScratch(tasks=12, steps=5)})
    report = evaluation.run("maml", layer, lambda: MLP(task.spec, hidden=[8]), CPU)
    first, scratch = report.rows[0], report.rows[1]
    own, other = (torch.tensor(row.values["query_loss"][:12], dtype=torch.float64) for row in (first, scratch))
    found = scratch.difference["query_loss"]
    assert found.mean == pytest.approx((other - own).mean().item(), rel=1e-6)
    half_width = 2.2009851600916 * (other - own).std().item() / 12**0.5  # Student's quantile for 11 degrees of freedom
    assert found.half_width == pytest.approx(half_width, rel=1e-6)
    assert first.difference is None


@pytest.mark.parametrize(("tasks", "judged"), [(2, 2), (None, 6)])
def test_from_scratch_is_judged_on_the_first_tasks_or_on_all(tasks, judged):
    task = Sinusoid()
    evaluation = Evaluation(tasks=6, seed=0, validation_tasks=2, baseline={"": FromScratch(tasks=tasks, steps=1)})
    report = evaluation.run("maml", layer_of(task, Exact()), lambda: MLP(task.spec, hidden=[8]), CPU)
    assert [row.tasks for row in report.rows] == [6, judged]
