"""Conventional baselines: pooled training, fine-tuning, probes and estimators beside plain versions of them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from mlframework.base_layers import MLP, BatchStatistics, Conv4, Stack
from mlframework.base_layers.normalisation import with_fixed_statistics
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation import Conventional, ConventionalOnFeatures, FineTuned, LinearProbe, Pretraining
from mlframework.evaluation.baselines.conventional import settings_of
from mlframework.evaluation.baselines.fine_tuning import fine_tuned
from mlframework.evaluation.baselines.pretraining import class_pool, of_all_classes
from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, raw_inputs
from mlframework.evaluation.choices import Rule, Trial
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, Prototypes
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TaskDistribution
from mlframework.tasks.few_shot import FewShotClassification

CPU = torch.device("cpu")
RULES = (Rule("Adam", 0.01), Rule("SGD", 0.1))
SHORT = functools.partial(Pretraining, steps=3, meta_batch=2)


def numbered(classes: int = 12, sides: int = 4) -> ArrayTasks:
    """Images of one grey each, the number of their class among all, with a little noise."""
    torch.manual_seed(0)
    y = torch.arange(classes).repeat_interleave(20)
    data = ClassIndexed.from_labels(y[:, None, None, None] + 0.01 * torch.randn(len(y), 1, sides, sides), y)
    return ArrayTasks({"train": data, "validation": data, "test": data}, n_way=3, k_shot=2, k_query=3)


def trial_of(task, layer, make, *, tasks: int = 6) -> Trial:
    sets = [TaskSet(task, split, tasks=tasks, seed=0) for split in ("test", "validation")]
    monitor = "query_loss" if task.spec.kind == "regression" else "query_accuracy"
    return Trial(layer, make, sets[0], sets[0].sources(), sets[1], RULES, monitor, CPU)


def image_trial(*, filters: int = 4) -> Trial:
    task = numbered(sides=8)

    def make():
        return Conv4(task.spec, filters=filters)

    return trial_of(task, Prototypes(make(), task), make)


def wave_trial() -> Trial:
    task = Sinusoid(k_shot=5, k_query=5)

    def make():
        return MLP(task.spec, hidden=[16])

    layer = MAML(make(), task, update=functools.partial(SGD, lr=0.01), meta_gradient=Exact(), inner_steps=1)
    return trial_of(task, layer, make)


def test_examples_of_all_classes_have_the_numbers_of_their_classes():
    task, generator = numbered(), torch.Generator().manual_seed(3)
    examples = of_all_classes(task, 5, generator)
    assert examples.x.shape == (1, 5 * 3 * (2 + 3), 1, 4, 4), "as many as a meta-batch of 5 tasks has"
    assert torch.equal(examples.x.mean((2, 3, 4)).round().long(), examples.y)


def test_examples_are_drawn_independently_from_all_classes():
    generator, task = torch.Generator().manual_seed(0), numbered()
    labels = torch.cat([of_all_classes(task, 40, generator).y[0] for _ in range(10)])
    assert stats.chisquare(labels.bincount(minlength=12)).pvalue > 0.001
    pairs = 12 * labels[:-1] + labels[1:]
    assert stats.chisquare(pairs.bincount(minlength=144)).pvalue > 0.001


class OwnLabels(FewShotClassification):
    """A classification that does not number its classes in the order in which it draws them."""

    def load(self, split):
        return numbered().load(split)

    def sample(self, num_tasks, split, generator):
        episode = super().sample(num_tasks, split, generator)
        return Episode(*(part._replace(y=self.n_way - 1 - part.y) for part in episode))


def test_classes_are_pooled_where_labels_number_what_a_task_drew():
    assert class_pool(OwnLabels((1, 4, 4), n_way=3, k_shot=2, k_query=3)) is None
    assert class_pool(Sinusoid()) is None
    assert class_pool(numbered()) is not None


def hidden_classes() -> ArrayTasks:
    """Inputs of which a small part tells the class, and a larger one is noise."""
    torch.manual_seed(0)
    y = torch.arange(12).repeat_interleave(20)
    x = torch.cat([3 * torch.eye(12)[y], 2 * torch.randn(len(y), 20)], dim=1)
    data = ClassIndexed.from_labels(x, y)
    return ArrayTasks({"train": data, "validation": data, "test": data}, n_way=3, k_shot=1, k_query=5)


def test_pretraining_learns_features_that_tell_all_training_classes_apart():
    task = hidden_classes()

    def make():
        return MLP(task.spec, hidden=[32], norm="none")

    trial = trial_of(task, Prototypes(make(), task), make, tasks=30)
    trained, untrained = (
        next(iter(LinearProbe(tasks=None, steps=1, pretraining=pretraining).rows("linear_probe", trial)))
        for pretraining in (
            Pretraining(steps=150, meta_batch=8, rates=[0.01]),
            Pretraining(steps=1, meta_batch=1, rates=[1e-8]),
        )
    )
    assert untrained.interval("query_accuracy").mean < 0.65
    assert trained.interval("query_accuracy").mean > 0.8


class SameLine(TaskDistribution):
    """A regression in which every task is the line y = 2 x."""

    spec = TaskSpec("regression", (1,), 1, ragged=False)

    def sample(self, num_tasks, split, generator):
        def examples(count):
            x = torch.randn(num_tasks, count, 1, generator=generator)
            return Examples(x, 2 * x, torch.ones(num_tasks, count))

        return Episode(examples(2), examples(20))


def test_tasks_with_common_targets_train_one_network_that_needs_no_support():
    task = SameLine()

    def make():
        return MLP(task.spec, hidden=[32])

    layer = MAML(make(), task, update=functools.partial(SGD, lr=0.01), meta_gradient=Exact(), inner_steps=1)
    trial = trial_of(task, layer, make)
    pretraining = Pretraining(steps=300, meta_batch=10, rates=[0.01])
    (row,) = FineTuned(tasks=None, steps=1, pretraining=pretraining).rows("finetune", trial)
    assert row.metrics["query_loss"][0].mean < 0.01, "before a single step of fine-tuning"


def test_baselines_of_one_evaluation_share_networks_and_others_do_not(monkeypatch):
    trained = []
    monkeypatch.setattr(Pretraining, "train", lambda self, trial, rate: trained.append(rate) or [rate])
    first, second = image_trial(), image_trial()
    assert list(SHORT(rates=[0.1, 0.2]).networks(first)) == list(SHORT(rates=[0.1, 0.2]).networks(first)) == [0.1, 0.2]
    assert trained == [0.1, 0.2]
    list(SHORT(rates=[0.2, 0.3]).networks(first))
    assert trained == [0.1, 0.2, 0.3]
    list(SHORT(rates=[0.1]).networks(second))
    list(Pretraining(steps=4, meta_batch=2, rates=[0.1]).networks(first))
    assert trained[3:] == [0.1, 0.1]


def test_a_network_with_batch_norm_is_tried_with_fixed_statistics_too():
    policy, fixed = SHORT(rates=[0.01]).networks(image_trial())
    assert (policy.named, fixed.named) == ("trained at 0.01", "trained at 0.01, fixed statistics")
    assert policy.base_layer.mixes_examples and not fixed.base_layer.mixes_examples


def test_fixed_statistics_are_those_of_batch_norm_in_use():
    torch.manual_seed(0)
    network = Stack(torch.nn.Linear(3, 4), BatchStatistics(4), torch.nn.Tanh(), BatchStatistics(4))
    seen, new = torch.randn(50, 3), torch.randn(6, 3)
    fixed = with_fixed_statistics(network, seen)
    torch.testing.assert_close(fixed(seen), network(seen))
    first, second = (torch.nn.BatchNorm1d(4, momentum=None) for _ in range(2))  # a cumulative average of one batch
    reference = torch.nn.Sequential(network[0], first, network[2], second)
    reference(seen)
    for norm in (first, second):
        norm.running_var *= 49 / 50  # torch keeps the unbiased one
    torch.testing.assert_close(fixed(new), reference.eval()(new))
    assert isinstance(network[1], BatchStatistics), "the network itself stays as it is"


def test_pretraining_leaves_the_algorithm_and_the_random_numbers_alone():
    trial = image_trial()
    before, state = {n: p.clone() for n, p in trial.meta_layer.named_parameters()}, torch.get_rng_state()
    networks = [next(SHORT(rates=[0.01]).networks(image_trial())) for _ in range(2)]
    list(SHORT(rates=[0.01]).networks(trial))
    assert torch.equal(torch.get_rng_state(), state) or networks  # drawing the trials moves them, training does not
    torch.testing.assert_close(dict(trial.meta_layer.named_parameters()), before, rtol=0, atol=0)
    first, second = (network.base_layer.state_dict() for network in networks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_fine_tuning_is_plain_gradient_descent_from_the_pretrained_network():
    """One task at a time, by torch.optim on a copy of the network."""
    trial = wave_trial()
    network = next(SHORT(rates=[0.01]).networks(trial))
    candidate = fine_tuned(network, Rule("SGD", 0.1), trial, steps=5, adapts=".")
    found = candidate.judge(trial.tasks)["query_loss"]
    assert list(candidate.steps) == [0, 1, 2, 5]
    (episode,) = trial.tasks
    for index in range(episode.num_tasks):
        copy = MLP(trial.task.spec, hidden=[16])
        copy.load_state_dict(network.base_layer.state_dict())
        optimizer = torch.optim.SGD(copy.parameters(), 0.1)
        losses = []
        for _ in range(6):
            losses.append((copy(episode.query.x[index]) - episode.query.y[index]).square().mean().item())
            optimizer.zero_grad()
            (copy(episode.support.x[index]) - episode.support.y[index]).square().mean().backward()
            optimizer.step()
        assert found[:, index].tolist() == pytest.approx([losses[step] for step in candidate.steps], rel=1e-4)


def test_a_head_that_adapts_alone_leaves_the_features():
    trial = wave_trial()
    network = next(SHORT(rates=[0.01]).networks(trial))
    whole, head = (
        fine_tuned(network, Rule("SGD", 0.1), trial, steps=2, adapts=adapts).judge(trial.tasks)["query_loss"]
        for adapts in (".", "^head")
    )
    assert torch.equal(whole[0], head[0]) and not torch.allclose(whole[2], head[2])


def test_a_linear_probe_is_scikit_learn_s_on_the_features():
    trial = image_trial()
    pretraining = SHORT(rates=[0.01])
    (row,) = LinearProbe(tasks=None, steps=1, pretraining=pretraining).rows("linear_probe", trial)
    penalty = float(row.setting.split(",")[0].removeprefix("C="))
    network = next(pretraining.networks(trial)).base_layer
    (episode,) = trial.tasks
    for index in range(episode.num_tasks):
        support, query = (Examples(*(leaf[index] for leaf in part)) for part in episode)
        mask = torch.cat([support.mask, torch.zeros_like(query.mask)])
        with torch.no_grad():
            features = network.features(torch.cat([support.x, query.x]), mask).double().numpy()
        known, asked = features[: len(support.x)], features[len(support.x) :]
        model = LogisticRegression(C=penalty, max_iter=1000).fit(known, support.y.numpy())
        assert row.values["query_accuracy"][index] == pytest.approx(model.score(asked, query.y.numpy()), abs=1e-6)


def estimator(**settings):
    return Conventional(**{"classifier": SVC(), "regressor": SVR(), "grid": {"C": [1.0]}, **settings})


def test_an_estimator_is_scikit_learn_s_on_the_raw_inputs_scaled_by_the_support_set():
    trial = image_trial()
    (row,) = estimator(grid={"C": [10.0], "kernel": ["linear"], "scaled": [True]}).rows("svm", trial)
    (episode,) = trial.tasks
    for index in range(episode.num_tasks):
        support, query = (part.x[index].flatten(1).numpy() for part in episode)
        scaler = StandardScaler().fit(support)
        model = SVC(C=10.0, kernel="linear").fit(scaler.transform(support), episode.support.y[index].numpy())
        expected = model.score(scaler.transform(query), episode.query.y[index].numpy())
        assert row.values["query_accuracy"][index] == pytest.approx(expected, abs=1e-6)
    assert row.setting == "C=10.0, kernel=linear, scaled=True"


def test_a_list_of_grids_is_tried_one_after_the_other():
    grids = [{"kernel": ["linear"]}, {"kernel": ["rbf"], "gamma": [0.1, 1.0]}]
    named = [setting for setting, _ in settings_of(SVC(), grids)]
    assert named == ["kernel=linear", "gamma=0.1, kernel=rbf", "gamma=1.0, kernel=rbf"]


def episode_of(x, y) -> Examples:
    return Examples(torch.tensor(x)[None], torch.tensor(y)[None], torch.ones(1, len(y)))


def test_more_neighbours_than_examples_are_all_of_them():
    task = Sinusoid(k_shot=2, k_query=2)
    layer = FittedEstimators(raw_inputs(), task, estimator=KNeighborsRegressor(n_neighbors=10))
    adapted = layer.adapt(episode_of([[0.0], [1.0]], [[2.0], [6.0]]))
    assert layer.predict(adapted, torch.zeros(1, 3, 1)).flatten().tolist() == [4.0, 4.0, 4.0]


class TwoOutputs(SameLine):
    spec = TaskSpec("regression", (1,), 2, ragged=False)


def test_an_estimator_of_one_output_is_fitted_to_each_of_several():
    layer = FittedEstimators(raw_inputs(), TwoOutputs(), estimator=SVR(C=1000.0, epsilon=1e-4))
    x = [[value / 10] for value in range(-10, 11)]
    adapted = layer.adapt(episode_of(x, [[v, -2 * v] for (v,) in x]))
    found = layer.predict(adapted, torch.tensor([[[0.5]]])).flatten().tolist()
    assert found == pytest.approx([0.5, -1.0], abs=0.05)


@pytest.mark.parametrize("wrong", [{"grid": {"c": [1.0]}}, {"classifier": KNeighborsRegressor()}])
def test_a_grid_or_an_estimator_that_does_not_fit_is_refused_in_one_line(wrong):
    with pytest.raises(InvalidValue, match=r"no estimator has c|takes a regression"):
        estimator(**wrong).check(numbered())


def test_estimators_are_not_for_sequences():
    class Text(SameLine):
        spec = TaskSpec("sequence", (7,), 3)

    with pytest.raises(UserError, match=r"is for a \w+ or a \w+, and Text is a sequence"):
        estimator().check(Text())


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"meta_batch": 0}, {"rates": []}, {"rates": [-1.0]}])
def test_pretraining_refuses_settings_in_one_line(wrong):
    with pytest.raises(InvalidValue, match=r"must"):
        Pretraining(**{"steps": 1, "meta_batch": 1, "rates": [0.1], **wrong})


class Untouched(TaskSet):
    """Test tasks that nobody may look at."""

    def __iter__(self):
        raise AssertionError("a setting was chosen on test tasks")


class Chosen(Exception):
    """The choice is made: test tasks may be looked at now."""


class Watched(Trial):
    """A trial that ends when a row is judged."""

    def row(self, *arguments, **settings):
        raise Chosen


@pytest.mark.parametrize("trial", [image_trial, wave_trial])
@pytest.mark.parametrize("name", ["finetune", "linear_probe", "knn", "knn_on_features", "on_raw"])
def test_nothing_is_chosen_on_test_tasks(trial, name):
    found = trial()
    watched = Watched(*found._replace(tasks=Untouched(found.task, "test", tasks=6, seed=0)))
    pretraining = SHORT(rates=[0.01])
    neighbours = {
        "classifier": KNeighborsClassifier(),
        "regressor": KNeighborsRegressor(),
        "grid": {"n_neighbors": [1]},
    }
    baseline = {
        "finetune": lambda: FineTuned(tasks=None, steps=2, pretraining=pretraining),
        "linear_probe": lambda: LinearProbe(tasks=None, steps=2, pretraining=pretraining),
        "knn": lambda: Conventional(**neighbours),
        "knn_on_features": lambda: ConventionalOnFeatures(**neighbours, pretraining=pretraining),
        "on_raw": estimator,
    }[name]()
    with pytest.raises(Chosen):
        list(baseline.rows(name, watched))


def test_a_constant_among_the_inputs_shrinks_as_they_do():
    ((named, estimator),) = settings_of(Ridge(fit_intercept=False), {"alpha": [2.0], "constant": [True]})
    x, y = np.random.default_rng(0).normal(size=(8, 2)), np.arange(8.0)
    wide = np.column_stack([np.ones(8), x])
    weights = np.linalg.solve(wide.T @ wide + 2 * np.eye(3), wide.T @ y)
    assert named == "alpha=2.0, constant=True"
    assert np.allclose(estimator.fit(x, y).predict(x), wide @ weights)


@pytest.mark.parametrize("trial", [image_trial, wave_trial])
@pytest.mark.parametrize(
    "name", ["linear", "nearest_neighbours", "support_vectors", "gradient_boosting", "random_forest"]
)
def test_every_option_of_an_estimator_judges_both_kinds_of_task(trial, name):
    from hydra import compose, initialize_config_module

    with initialize_config_module("mlframework.conf", version_base="1.3"):
        part = compose(f"evaluation/baseline/{name}").evaluation.baseline[name]
    baseline, found = instantiate(OmegaConf.to_container(part)), trial()
    baseline.check(found.task)
    few = found._replace(tasks=found.tasks.first(2), validation=found.validation.first(1))
    (row,) = baseline.rows(name, few)
    assert row.method == name.replace("_", " ") and row.tasks == 2
    assert all(np.isfinite(row.values[found.monitor]))
