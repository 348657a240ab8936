"""Evaluation: frozen tasks, intervals, policies apart, and baselines that are what they say."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.ensemble import VotingClassifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC, LinearSVC

from mlframework.base_layers import MLP, Conv4
from mlframework.episode import Episode
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.baselines.from_scratch import FromScratch, TrainedFromScratch
from mlframework.evaluation.baselines.scikit_learn import FittedEstimators, OnFeatures, ScikitLearn, raw_inputs
from mlframework.evaluation.evaluation import Evaluation
from mlframework.evaluation.interval import Interval, half_width_over_sources
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet, judge_by_step, task_values
from mlframework.inner_loop import SGD, Adam
from mlframework.meta_layers import MAML, Exact, Prototypes
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid

CPU = torch.device("cpu")


@pytest.fixture
def images() -> ArrayTasks:
    torch.manual_seed(0)
    data = ClassIndexed.from_labels(torch.rand(80, 1, 8, 8), torch.arange(8).repeat(10))
    return ArrayTasks({"train": data, "validation": data, "test": data}, n_way=3, k_shot=2, k_query=3)


def maml(task, base_layer, steps: int = 2) -> MAML:
    return MAML(base_layer, task, update=functools.partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=steps)


def conventional(*, tasks: int, steps: int):
    """The baselines of most tasks."""
    return {"from_scratch": FromScratch(tasks=tasks, steps=steps), "scikit_learn": ScikitLearn()}


def test_interval_is_that_of_scipy():
    values = torch.tensor([0.3, 1.2, -0.4, 2.2, 0.9])
    interval = Interval.of(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean().item(), scale=stats.sem(values.numpy()))
    assert interval.mean - interval.half_width == pytest.approx(low, rel=1e-6)
    assert interval.mean + interval.half_width == pytest.approx(high, rel=1e-6)


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    covered = [
        abs(interval.mean) <= interval.half_width
        for interval in (Interval.of(torch.randn(20, generator=generator)) for _ in range(2000))
    ]
    assert 0.93 < np.mean(covered) < 0.97


def test_a_task_set_is_the_same_whatever_the_chunk_and_begins_the_same_whatever_its_size():
    task = Sinusoid()
    whole = next(iter(TaskSet(task, "test", tasks=12, seed=3, chunk=12)))
    parts = list(TaskSet(task, "test", tasks=12, seed=3, chunk=5))
    assert torch.equal(whole.query.x, torch.cat([part.query.x for part in parts]))
    assert torch.equal(whole.query.x[:4], next(iter(TaskSet(task, "test", tasks=4, seed=3))).query.x)


@pytest.mark.parametrize("wrong", [{"tasks": 0}, {"chunk": 0}])
def test_a_task_set_of_no_tasks_is_refused_in_one_line(wrong):
    with pytest.raises(InvalidValue, match="must be at least 1"):
        TaskSet(Sinusoid(), "test", **{"tasks": 6, "seed": 0, **wrong})


def test_the_hash_tells_seeds_apart_and_nothing_else():
    def hash_of(**more):
        return TaskSet(Sinusoid(), "test", **{"tasks": 6, "seed": 0, **more}).hash()

    assert hash_of() == hash_of(chunk=4)
    assert hash_of() != hash_of(seed=1)
    assert hash_of() != hash_of(tasks=5)


def test_the_hash_of_the_default_sinusoids_is_the_documented_one():
    """Frozen means frozen: a change here makes every published number incomparable, and belongs in the changelog."""
    assert TaskSet(Sinusoid(k_shot=10, k_query=10), "test", tasks=600, seed=0).hash() == "ce9cc611be5919da"


def test_metrics_after_every_inner_step_equal_those_of_plain_gradient_descent():
    """One task at a time, by torch.optim on a copy of the network."""
    task = Sinusoid()
    layer = maml(task, MLP(task.spec, hidden=[8]))
    episode = task.sample(3, "test", torch.Generator().manual_seed(0))
    judged = judge_by_step(layer, episode, 4)["query_loss"]
    for index in range(3):
        network = MLP(task.spec, hidden=[8])
        network.load_state_dict(layer.base_layer.state_dict())
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for step in range(5):
            loss = (network(episode.query.x[index]) - episode.query.y[index]).square().mean()
            assert judged[step, index].item() == pytest.approx(loss.item(), rel=1e-5)
            optimizer.zero_grad()
            (network(episode.support.x[index]) - episode.support.y[index]).square().mean().backward()
            optimizer.step()


def test_the_costly_policy_is_judged_before_and_after_the_chosen_steps_alone(images):
    layer = maml(images, Conv4(images.spec, filters=4), steps=3)
    evaluation = Evaluation(tasks=2, seed=0, validation_tasks=3)
    transductive, inductive = evaluation.run("maml", layer, lambda: layer.base_layer, CPU).rows[:2]
    chosen = transductive.chosen
    assert chosen == inductive.chosen > 0
    assert (transductive.steps, inductive.steps) == ((0, 1, 2, 3), (0, chosen))
    (episode,) = TaskSet(images, "test", tasks=2, seed=0)
    all_steps = judge_by_step(layer, episode, 3, "inductive")["query_loss"].mean(1)
    found = [interval.mean for interval in inductive.metrics["query_loss"]]
    assert found == pytest.approx(all_steps[[0, chosen]].tolist())


def test_inductive_queries_do_not_see_each_other_and_transductive_ones_do(images):
    layer = maml(images, Conv4(images.spec, filters=4))
    episode = images.sample(2, "test", torch.Generator().manual_seed(0))
    changed = episode._replace(query=episode.query._replace(x=episode.query.x.clone()))
    changed.query.x[:, 1:] = torch.rand_like(changed.query.x[:, 1:])
    adapted = layer.adapt(episode.support)
    for policy, sees in (("inductive", False), ("support", False), ("transductive", True)):
        before = layer.predict_query(adapted, episode, policy)[:, 0]
        after = layer.predict_query(adapted, changed, policy)[:, 0]
        assert torch.equal(before, after) is not sees


def test_an_inductive_prediction_is_that_of_the_query_beside_the_support(images):
    layer = maml(images, Conv4(images.spec, filters=4))
    episode = images.sample(1, "test", torch.Generator().manual_seed(0))
    adapted = layer.adapt(episode.support)
    row = torch.cat([episode.support.x[0], episode.query.x[0, 4:5]])
    alone = torch.func.functional_call(layer.base_layer, {n: p[0] for n, p in adapted.items()}, (row,))[-1]
    assert torch.allclose(layer.predict_query(adapted, episode, "inductive")[0, 4], alone, atol=1e-6)


def test_under_the_support_policy_queries_are_normalised_as_the_support_set_is(images):
    layer = maml(images, Conv4(images.spec, filters=4))
    support = images.sample(2, "test", torch.Generator().manual_seed(0)).support
    adapted = layer.adapt(support)
    # Queries that are support examples are predicted as these are among themselves.
    found = layer.predict_query(adapted, Episode(support, support.rows(slice(2))), "support")
    assert torch.allclose(found, layer.predict(adapted, support.x)[:, :2], atol=1e-6)


def test_a_layer_trained_by_the_support_policy_is_judged_by_it_first(images):
    evaluation = Evaluation(tasks=2, seed=0, validation_tasks=2)
    layer = Prototypes(Conv4(images.spec, filters=4), images)
    report = evaluation.run("prototypes", layer, lambda: Conv4(images.spec, filters=4), CPU)
    assert [row.batch_norm for row in report.rows] == ["support", "transductive"]


@pytest.mark.slow
def test_a_report_holds_both_policies_where_examples_mix_and_one_where_they_do_not(images):
    evaluation = Evaluation(tasks=6, seed=0, validation_tasks=2, baseline=conventional(tasks=2, steps=2))
    for norm, policies in (("batch", ["transductive", "inductive"]), ("group", ["none"])):
        base = functools.partial(Conv4, images.spec, filters=4, norm=norm)
        report = evaluation.run("maml", maml(images, base()), base, CPU)
        assert [row.batch_norm for row in report.rows if row.method == "maml"] == policies
        assert report.rows[0].steps == (0, 1, 2)
        assert [row.method for row in report.rows[-2:]] == ["from scratch", "scikit-learn LogisticRegression"]


def test_from_scratch_trains_what_a_frozen_base_layer_froze():
    task = Sinusoid(k_shot=3, k_query=3)

    def network(*, frozen):
        torch.manual_seed(0)
        return MLP(task.spec, hidden=[8]).requires_grad_(not frozen)

    episode = next(iter(TaskSet(task, "test", tasks=2, seed=0)))
    found = [
        judge_by_step(
            TrainedFromScratch(
                functools.partial(network, frozen=frozen), task, update=functools.partial(SGD, lr=0.01), steps=3
            ),
            episode,
            3,
        )
        for frozen in (False, True)
    ]
    torch.testing.assert_close(*found)


def test_from_scratch_fits_every_support_set_from_an_initialisation_of_its_own():
    task = Sinusoid()
    torch.manual_seed(0)
    scratch = TrainedFromScratch(
        functools.partial(MLP, task.spec), task, update=functools.partial(Adam, lr=0.01), steps=300
    )
    episode = task.sample(3, "test", torch.Generator().manual_seed(0))
    before, *_, after = scratch.trajectory(episode.support, 300)
    assert not torch.equal(before["head.weight"][0], before["head.weight"][1])
    losses = [task.loss(scratch.predict(p, episode.support.x), episode.support.y).mean(1) for p in (before, after)]
    assert (losses[1] < losses[0] / 10).all()


@pytest.mark.parametrize("estimator", [LogisticRegression(max_iter=1000), KernelRidge(kernel="rbf", gamma=0.5)])
def test_the_scikit_learn_row_is_what_scikit_learn_gives(images, estimator):
    regression = isinstance(estimator, KernelRidge)
    task = Sinusoid() if regression else images
    fitted = FittedEstimators(raw_inputs(), task, estimator=estimator)
    name = "query_loss" if regression else "query_accuracy"
    found = float(task_values(fitted, TaskSet(task, "test", tasks=5, seed=0), 0, device=CPU)[name][0].double().mean())
    episode = next(iter(TaskSet(task, "test", tasks=5, seed=0)))
    expected = []
    for index in range(5):
        (x, y, _), (qx, qy, _) = ((leaf[index].numpy() for leaf in part) for part in episode)
        model = estimator.fit(x.reshape(len(x), -1), y)
        predicted = model.predict(qx.reshape(len(qx), -1))
        expected.append(np.mean((predicted - qy) ** 2) if regression else np.mean(predicted == qy))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def spread(kind: str):
    """A task of a kind, and features of it."""
    task = Sinusoid() if kind == "regression" else blobs(n_way=2 if kind == "two classes" else 4)
    return task, MLP(task.spec, hidden=[7])


def blobs(n_way: int, k_shot: int | list[int] = 3) -> ArrayTasks:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(12)
    x = torch.randn(8, 5, generator=generator)[labels] + torch.randn(96, 5, generator=generator)
    data = ClassIndexed.from_labels(x, labels)
    return ArrayTasks({"test": data}, n_way=n_way, k_shot=k_shot, k_query=3)


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        ("two classes", LinearSVC()),
        ("two classes", SVC(C=3.0)),
        ("classes", LinearSVC()),
        ("classes", SVC()),
        ("classes", RidgeClassifier()),
        ("classes", KNeighborsClassifier(1)),
        ("classes", VotingClassifier([("nearest", KNeighborsClassifier(1))])),  # has neither probabilities nor margins
        ("regression", Ridge(alpha=0.1)),
    ],
    ids=str,
)
def test_an_estimator_on_features_is_judged_as_scikit_learn_would(kind, estimator):
    task, network = spread(kind)
    fitted = FittedEstimators(network, task, estimator=estimator)
    support, query = next(iter(TaskSet(task, "test", tasks=5, seed=0)))
    found = fitted.predict(fitted.adapt(support), query.x)
    for index, prediction in enumerate(found):
        with torch.no_grad():
            x, asked = (network.features(part.x[index]).numpy() for part in (support, query))
        expected = estimator.fit(x, support.y[index].numpy()).predict(asked)
        chosen = prediction if kind == "regression" else prediction.argmax(-1)
        assert np.allclose(chosen.flatten().numpy(), expected, atol=1e-4)


def test_a_class_that_an_estimator_has_not_met_has_a_small_probability():
    task = blobs(n_way=4)
    support, query = next(iter(TaskSet(task, "test", tasks=3, seed=0)))
    support = support._replace(mask=support.mask * (support.y != 2))
    for estimator in (LinearSVC(), LogisticRegression(), VotingClassifier([("margin", LinearSVC())])):
        fitted = FittedEstimators(raw_inputs(), task, estimator=estimator)
        prediction = fitted.predict(fitted.adapt(support), query.x)
        assert prediction.isfinite().all()
        assert (prediction.argmax(-1) != 2).all()
        probability, least = prediction[..., 2].exp(), 1 / (support.mask.sum(1)[:, None] + 4)
        # Divided by a sum of at most 1 and one such number for each class but one.
        assert (probability <= least).all() and (probability >= least / (1 + 3 * least)).all(), "as one never seen"
        assert torch.allclose(prediction.exp().sum(-1), torch.ones(3, len(query.x[0])))


def test_a_report_has_a_row_for_each_estimator_on_the_algorithm_s_features(images):
    images = ArrayTasks(images.splits, n_way=3, k_shot=1, k_query=3)
    base = functools.partial(Conv4, images.spec, filters=4)
    layer = Prototypes(base(), images)
    asked = {"margin": LinearSVC(), "nearest": KNeighborsClassifier(1)}
    evaluation = Evaluation(tasks=6, seed=0, validation_tasks=3, baseline={"on_features": OnFeatures(**asked)})
    report = evaluation.run("prototypes", layer, base, CPU)
    rows = {row.method: row for row in report.rows}
    assert [row.batch_norm for name, row in rows.items() if name.endswith("on features")] == ["support", "support"]
    # The nearest neighbour is what prototypes are in one shot.
    found = rows["nearest on features"].metrics["query_accuracy"][0].mean
    assert found == pytest.approx(report.rows[0].metrics["query_accuracy"][0].mean)


def test_an_estimator_of_the_wrong_kind_is_refused_before_anything_is_judged():
    evaluation = Evaluation(tasks=2, seed=0, baseline={"on_features": OnFeatures(wave=Ridge())})
    with pytest.raises(UserError, match="wave=Ridge: takes a regression, and ArrayTasks is a classification"):
        evaluation.check(blobs(n_way=2))
    given = Evaluation(tasks=2, seed=0, baseline={"scikit_learn": ScikitLearn(estimator=SVC())})
    with pytest.raises(UserError, match="estimator=SVC: takes a classification, and Sinusoid is a regression"):
        given.check(Sinusoid())
    evaluation.check(Sinusoid())


class Louder(Sinusoid):
    """Sinusoids a hundred times as high in the test split: losses tell on which tasks something was judged."""

    def sample(self, num_tasks, split, generator):
        episode = super().sample(num_tasks, split, generator)
        height = 100 if split == "test" else 1
        return Episode(*(part._replace(y=height * part.y) for part in episode))


def test_every_row_is_judged_on_the_split_asked_for_and_chosen_on_validation():
    task = Louder()
    base = functools.partial(MLP, task.spec, hidden=[8])
    settings = {"baseline": conventional(tasks=10, steps=3), "adam_rates": [0.01], "sgd_rates": []}
    evaluation = Evaluation(tasks=20, seed=0, validation_tasks=20, **settings)
    report = evaluation.run("maml", maml(task, base()), base, CPU)
    assert [row.method for row in report.rows] == ["maml", "from scratch", "scikit-learn KernelRidge"]
    for row in report.rows:  # squared errors of waves that are a hundred times as high
        assert row.interval("query_loss").mean > 1000 * row.validation


def trained_by_torch(tasks: TaskSet, make, optimizer, steps: int) -> torch.Tensor:
    """Query losses `[steps + 1, tasks]` of a new network for each task, trained on its support set by torch.optim."""
    torch.manual_seed(tasks.seed)
    make()  # the one that says which shapes there are
    networks, curves = [make() for _ in range(tasks.tasks)], []
    (episode,) = tasks
    for network, x, y, query_x, query_y in zip(networks, *episode.support[:2], *episode.query[:2], strict=True):
        rule, curve = optimizer(network.parameters()), []
        for _ in range(steps + 1):
            curve.append((network(query_x) - query_y).square().mean().item())
            rule.zero_grad()
            (network(x) - y).square().mean().backward()
            rule.step()
        curves.append(curve)
    return torch.tensor(curves).T


def test_from_scratch_is_torchs_training_of_one_initialisation_by_every_rule_on_the_first_tasks():
    task = Sinusoid()
    base = functools.partial(MLP, task.spec, hidden=[8])
    settings = {"baseline": conventional(tasks=3, steps=7), "adam_rates": [0.05], "sgd_rates": [0.01]}
    report = Evaluation(tasks=6, seed=3, validation_tasks=4, **settings).run("maml", maml(task, base()), base, CPU)
    (row,) = (row for row in report.rows if row.method == "from scratch")
    rules = {
        "Adam 0.05": functools.partial(torch.optim.Adam, lr=0.05),
        "SGD 0.01": functools.partial(torch.optim.SGD, lr=0.01),
    }
    validation = TaskSet(task, "validation", tasks=4, seed=VALIDATION_SEED)
    steps = [0, 1, 2, 5, 7]
    curves = {name: trained_by_torch(validation, base, rule, 7)[steps].mean(1) for name, rule in rules.items()}
    best = min(curves, key=lambda name: curves[name].min())
    assert (row.setting, row.chosen, row.steps) == (best, steps[curves[best].argmin()], tuple(steps))
    assert row.validation == pytest.approx(curves[best].min().item(), rel=1e-4)
    wanted = trained_by_torch(TaskSet(task, "test", tasks=3, seed=3), base, rules[best], 7)
    assert row.values["query_loss"] == pytest.approx(wanted[row.chosen].tolist(), rel=1e-4)


def test_methods_and_their_differences_have_intervals_over_sources():
    """Two of 40 classes in each task: the interval of the values that are reported, by the sources of the tasks."""
    torch.manual_seed(0)
    task = ArrayTasks(
        dict.fromkeys(
            ("train", "validation", "test"),
            ClassIndexed.from_labels(torch.randn(240, 4), torch.arange(40).repeat(6)),
        ),
        n_way=2,
        k_shot=1,
        k_query=4,
    )
    base = functools.partial(MLP, task.spec, hidden=[8])
    settings = {"baseline": conventional(tasks=20, steps=1), "adam_rates": [0.01], "sgd_rates": []}
    report = Evaluation(tasks=30, seed=0, validation_tasks=2, **settings).run(
        "prototypes", Prototypes(base(), task), base, CPU
    )
    sources, first = TaskSet(task, "test", tasks=30, seed=0).sources(), report.rows[0]
    assert [row.tasks for row in report.rows] == [30, 20, 30]
    for row in report.rows:
        values = torch.tensor(row.values["query_loss"])
        wanted = half_width_over_sources(values, sources[: row.tasks])
        assert row.interval("query_loss").over_sources == pytest.approx(wanted, rel=1e-4)
        if row is not first:
            wanted = half_width_over_sources(
                values - torch.tensor(first.values["query_loss"])[: row.tasks], sources[: row.tasks]
            )
            assert row.difference["query_loss"].over_sources == pytest.approx(wanted, rel=1e-3)
