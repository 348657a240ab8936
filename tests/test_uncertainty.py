"""Predictive distributions: their qualities by hand and by other libraries, and the predictors made of an algorithm."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from commands import SHORT, call
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.autograd.functional import hessian

from mlframework.base_layers import GRU, MLP
from mlframework.cli import evaluate, train
from mlframework.errors import UserError
from mlframework.evaluation import LaplaceHead, Temperature, Uncertainty, calibration
from mlframework.evaluation.calibration import Answers, predicted_queries
from mlframework.evaluation.predictors import laplace
from mlframework.evaluation.predictors.predictor import with_variance
from mlframework.evaluation.predictors.temperature import best_temperature, tempered
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet, task_values
from mlframework.evaluation.uncertainty import strangers, with_next_queries
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, ConditionalNeuralProcess, Exact, InContext, Predictive, Prototypes, Ridge
from mlframework.meta_layers.svm.kernels import LinearKernel
from mlframework.runs import Trained
from mlframework.runs.ensemble import Averaged
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid, TextLists

# Definitions.


def classes_of(probabilities, labels, mask=None):
    """Answers in a classification, from the probabilities `[tasks, n, classes]`."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    y = torch.tensor(labels)
    counts = torch.ones(y.shape).double() if mask is None else torch.tensor(mask).double()
    return Answers("classification", Predictive(logits), y, counts)


def values_of(mean, variance, y, mask=None):
    """Answers in a regression of one output, each argument `[tasks, n]`."""
    mean, variance, y = (torch.as_tensor(each, dtype=torch.float64).unsqueeze(-1) for each in (mean, variance, y))
    counts = torch.ones(y.shape[:2]).double() if mask is None else torch.as_tensor(mask).double()
    return Answers("regression", Predictive(mean, variance), y, counts)


#: Two tasks of two queries: confidences 0.9 (right), 0.6 (wrong), 0.6 (right), 0.8 (wrong).
BY_HAND = classes_of([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.2, 0.8]]], [[0, 1], [1, 0]])


def test_the_calibration_error_by_hand():
    """Of two bins only the upper has queries: accuracy 0.5, confidence 0.725. Of five, each has its own gap."""
    assert calibration.calibration_error(BY_HAND, 1).mean().item() == pytest.approx(0.225)
    assert calibration.calibration_error(BY_HAND, 2).mean().item() == pytest.approx(0.225)
    # ]0.4, 0.6]: two queries, accuracy 0.5, confidence 0.6; ]0.6, 0.8]: 0 and 0.8; ]0.8, 1]: 1 and 0.9.
    assert calibration.calibration_error(BY_HAND, 5).mean().item() == pytest.approx((2 * 0.1 + 0.8 + 0.1) / 4)
    bins = calibration.binned(BY_HAND, 5)
    assert bins.queries.tolist() == [0, 0, 2, 1, 1]
    assert bins.accuracy.tolist() == [0, 0, 0.5, 0, 1]
    assert bins.confidence.tolist() == pytest.approx([0, 0, 0.6, 0.8, 0.9])


def test_adaptive_bins_have_equally_many_queries():
    """Ordered: 0.6 and 0.6 (one right), then 0.8 (wrong) and 0.9 (right)."""
    bins = calibration.binned(BY_HAND, 2, adaptive=True)
    assert bins.queries.tolist() == [2, 2]
    found = calibration.calibration_error(BY_HAND, 2, adaptive=True).mean().item()
    assert found == pytest.approx((abs(1 - 1.2) + abs(1 - 1.7)) / 4)


def test_a_calibration_error_is_that_of_a_slow_version_whatever_the_tasks_and_masks():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 9, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (7, 9), generator=generator)
    mask = (torch.rand(7, 9, generator=generator) < 0.7).double()
    mask[:, 0] = 1
    found = calibration.calibration_error(Answers("classification", Predictive(logits), y, mask), 15).mean()
    kept = mask.flatten() > 0
    p, labels = logits.softmax(-1).flatten(0, 1)[kept].numpy(), y.flatten()[kept].numpy()
    confidence, right = p.max(1), p.argmax(1) == labels
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.item() == pytest.approx(total)


def test_likelihood_brier_score_and_accuracy_are_those_of_scikit_learn():
    p, y = BY_HAND.found.prediction.softmax(-1).flatten(0, 1).numpy(), BY_HAND.y.flatten().numpy()
    assert calibration.nll(BY_HAND).mean().item() == pytest.approx(log_loss(y, p))
    # scikit-learn counts one of two classes.
    assert calibration.brier(BY_HAND).mean().item() == pytest.approx(2 * brier_score_loss(y, p[:, 1]))
    assert calibration.accuracy(BY_HAND).tolist() == [0.5, 0.5]


def test_padding_counts_nowhere():
    padded = classes_of(
        [[[0.9, 0.1], [0.6, 0.4], [0.01, 0.99]], [[0.4, 0.6], [0.2, 0.8], [0.7, 0.3]]],
        [[0, 1, 0], [1, 0, 1]],
        [[1, 1, 0], [1, 1, 0]],
    )
    for measure in (calibration.nll, calibration.brier, calibration.accuracy):
        torch.testing.assert_close(measure(padded), measure(BY_HAND))
    for bins in (2, 5):
        torch.testing.assert_close(
            calibration.calibration_error(padded, bins), calibration.calibration_error(BY_HAND, bins)
        )


def test_the_likelihood_and_the_coverage_of_values_are_those_of_normal_distributions():
    generator = np.random.default_rng(0)
    mean, y = generator.normal(size=(3, 40)), generator.normal(size=(3, 40))
    deviation = generator.uniform(0.5, 2, size=(3, 40))
    answers = values_of(mean, deviation**2, y)
    np.testing.assert_allclose(calibration.nll(answers), -norm.logpdf(y, mean, deviation).mean(1))
    low, high = norm.interval(0.9, mean, deviation)
    found = calibration.coverage(answers, torch.tensor([0.9], dtype=torch.float64))[:, 0]
    np.testing.assert_allclose(found, ((low <= y) & (y <= high)).mean(1))
    np.testing.assert_allclose(calibration.mse(answers), ((mean - y) ** 2).mean(1))


def test_the_interval_error_is_0_for_the_true_distribution_and_known_for_one_twice_as_wide():
    y = torch.tensor(norm.ppf((np.arange(20000) + 0.5) / 20000)).view(4, 5000)
    right = values_of(torch.zeros(4, 5000), torch.ones(4, 5000), y)
    assert calibration.interval_error(right).mean().item() == pytest.approx(0, abs=1e-3)
    wide = values_of(torch.zeros(4, 5000), 4 * torch.ones(4, 5000), y)
    levels = calibration.LEVELS.numpy()
    expected = np.abs(2 * norm.cdf(2 * norm.ppf((1 + levels) / 2)) - 1 - levels).mean()
    assert calibration.interval_error(wide).mean().item() == pytest.approx(expected, abs=1e-3)


def test_the_area_under_the_curve_is_that_of_scikit_learn_with_ties_and_padding():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randint(5, (3, n), generator=generator).double() for n in (6, 4))
    own_counts, other_counts = torch.ones(3, 6), torch.ones(3, 4)
    own_counts[1, 2:], other_counts[2, 1] = 0, 0
    found = calibration.auroc(own, other, own_counts, other_counts)
    for task in range(3):
        ours, theirs = own[task][own_counts[task] > 0], other[task][other_counts[task] > 0]
        truth = [0] * len(ours) + [1] * len(theirs)
        assert found[task].item() == pytest.approx(roc_auc_score(truth, torch.cat([ours, theirs]).numpy()))


def test_every_task_is_asked_the_queries_of_the_next_one_across_chunks():
    tasks = TaskSet(Sinusoid(k_shot=2, k_query=3), "test", tasks=5, seed=0, chunk=2)
    plain, moved = list(tasks), list(with_next_queries(tasks))
    y = torch.cat([episode.query.y for episode in plain])
    torch.testing.assert_close(torch.cat([episode.query.y for episode in moved]), y.roll(-1, dims=0))
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(one.support.y, other.support.y)
    assert strangers([("a",), ("a", "b"), ("c",)], 3) == [False, True, True]


# Predictors.


def blobs(k_shot=3, k_query=6):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 40
    x = torch.randn(40, 6, generator=generator)[y] + 0.7 * torch.randn(400, 6, generator=generator)
    data = ClassIndexed.from_labels(x, y)
    return ArrayTasks(dict.fromkeys(("train", "validation", "test"), data), n_way=3, k_shot=k_shot, k_query=k_query)


def maml(task, **settings):
    settings = {"update": partial(SGD, lr=0.1), "meta_gradient": Exact(), "inner_steps": 2, **settings}
    return MAML(MLP(task.spec, hidden=[8]), task, **settings)


def validation_of(task, tasks=12):
    return TaskSet(task, "validation", tasks=tasks, seed=VALIDATION_SEED)


def test_the_best_temperature_undoes_a_wrong_one():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 4000, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(-1)[0], 1, generator=generator).T
    answers = Answers("classification", Predictive(5 * logits), y, torch.ones(1, 4000).double())
    assert best_temperature(answers) == pytest.approx(5, rel=0.05)
    after = answers._replace(found=tempered(answers.found, best_temperature(answers)))
    before, after = (calibration.calibration_error(each, 15).mean().item() for each in (answers, after))
    assert after < 0.02 < 0.1 < before


def test_the_best_temperature_of_a_regression_is_the_mean_squared_z_score():
    answers = values_of([[0.0, 0.0]], [[1.0, 4.0]], [[2.0, 2.0]])
    assert best_temperature(answers) == pytest.approx((4 + 1) / 2)
    costs = [calibration.nll(answers._replace(found=tempered(answers.found, t))).item() for t in (2.4, 2.5, 2.6)]
    assert costs[1] == min(costs)


def test_a_temperature_changes_no_choice_of_a_class():
    task = blobs()
    layer = Prototypes(MLP(task.spec, hidden=[8]), task)
    made, setting, change = Temperature().fitted(layer, validation_of(task), 0)
    before, after = (predicted_queries(each, validation_of(task), 0) for each in (layer, made))
    assert float(setting) == pytest.approx(made.temperature, rel=1e-2)
    torch.testing.assert_close(after.found.prediction, before.found.prediction / made.temperature)
    torch.testing.assert_close(before.changed(change).found.prediction, after.found.prediction)
    assert calibration.nll(after).mean() < calibration.nll(before).mean()


def test_a_regression_without_a_variance_gets_its_mean_squared_error():
    task = Sinusoid(k_shot=4, k_query=5)
    layer = maml(task)
    made = with_variance(layer, validation_of(task), 2)
    errors = calibration.mse(predicted_queries(layer, validation_of(task), 2)).mean()
    answers = predicted_queries(made, validation_of(task), 2)
    torch.testing.assert_close(answers.found.variance, errors.expand(12, 5, 1), rtol=1e-6, atol=0)
    stated = ConditionalNeuralProcess(MLP(task.spec, hidden=[8]), task, hidden=[8], least_deviation=0.1)
    assert with_variance(stated, validation_of(task), 0) is stated
    classes = Prototypes(MLP(blobs().spec, hidden=[8]), blobs())
    assert with_variance(classes, validation_of(blobs()), 0) is classes


def head_problem(kind):
    """Support features `[1, n, d]` with a bias, classes' probabilities, and query features."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    features, queries = laplace.with_bias(draw(1, 7, 4)), laplace.with_bias(draw(1, 3, 4))
    logits = features @ draw(1, 5, 3)
    return laplace.Support(features, logits.softmax(-1), torch.ones(1, 7).double()), queries, logits


def test_the_variance_of_logits_is_that_of_the_hessian_of_the_head_s_loss():
    """A head is linear, so that the Gauss-Newton matrix of its cross-entropy is the Hessian."""
    support, queries, logits = head_problem("classification")
    weights = torch.linalg.lstsq(support.features[0], logits[0]).solution  # [d, classes]: the head with these logits
    y = torch.randint(3, (7,), generator=torch.Generator().manual_seed(1))

    def loss(flat):
        return torch.nn.functional.cross_entropy(support.features[0] @ flat.view(5, 3), y, reduction="sum")

    matrix = hessian(loss, weights.flatten()) + 0.3 * torch.eye(15, dtype=torch.float64)
    covariance = torch.linalg.inv(matrix)
    found = laplace.variance_of_logits(support, queries, 0.3)
    for q, query in enumerate(queries[0]):
        for label in range(3):
            row = torch.zeros(5, 3, dtype=torch.float64)
            row[:, label] = query
            expected = row.flatten() @ covariance @ row.flatten()
            assert found[0, q, label].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_variance_of_values_is_that_of_bayesian_linear_regression():
    support, queries, _ = head_problem("regression")
    matrix = support.features[0].mT @ support.features[0] + 0.3 * torch.eye(5, dtype=torch.float64)
    expected = 1 + (queries[0] @ torch.linalg.inv(matrix) * queries[0]).sum(-1)
    torch.testing.assert_close(laplace.variance_of_values(support, queries, 0.3)[0], expected)


def test_rows_of_padding_do_not_make_a_head_certain():
    support, queries, _ = head_problem("classification")
    padded = laplace.Support(
        torch.cat([support.features, torch.zeros(1, 2, 5)], dim=1),
        torch.cat([support.probabilities, torch.full((1, 2, 3), 1 / 3)], dim=1),
        torch.cat([support.counts, torch.zeros(1, 2)], dim=1),
    )
    for variance in (laplace.variance_of_logits, laplace.variance_of_values):
        torch.testing.assert_close(variance(padded, queries, 0.3), variance(support, queries, 0.3))


def prototypes(task):
    return Prototypes(MLP(task.spec, hidden=[8]), task)


@pytest.mark.parametrize("make", [maml, prototypes])
def test_a_laplace_head_takes_the_likeliest_precision(make):
    task = blobs()
    layer, validation = make(task), validation_of(task)
    steps = layer.test_inner_steps
    precisions = [1e-3, 0.1, 10.0, 1e3]
    made = LaplaceHead(precisions=precisions).fitted(layer, validation, steps)
    costs = [
        calibration.nll(predicted_queries(laplace.LaplaceLayer(layer, each), validation, steps)).mean().item()
        for each in precisions
    ]
    assert made.meta_layer.precision == precisions[costs.index(min(costs))]
    # The prior's weight without end is the algorithm itself.
    certain = predicted_queries(laplace.LaplaceLayer(layer, 1e12), validation, steps)
    own = predicted_queries(layer, validation, steps)
    torch.testing.assert_close(certain.found.prediction.softmax(-1), own.found.prediction.softmax(-1))


def test_an_offset_of_all_logits_changes_no_moderated_probability():
    logits, variance = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    variance = variance.square()
    found, moved = (laplace.moderated(each, variance).softmax(-1) for each in (logits, logits - 100))
    torch.testing.assert_close(found, moved)
    assert (found - logits.softmax(-1)).abs().max() > 0.01


def test_a_laplace_head_of_a_regression_has_the_likeliest_noise():
    task = Sinusoid(k_shot=6, k_query=8)
    layer = Ridge(MLP(task.spec, hidden=[8]), task, kernel=LinearKernel(constant=1.0))
    validation = validation_of(task)
    made = LaplaceHead(precisions=[0.01, 1.0]).fitted(with_variance(layer, validation, 0), validation, 0).meta_layer
    best = calibration.nll(predicted_queries(made, validation, 0)).mean().item()
    for factor in (0.9, 1.1):
        other = laplace.LaplaceLayer(made.inner, made.precision, factor * made.noise)
        assert calibration.nll(predicted_queries(other, validation, 0)).mean().item() > best


def test_the_features_of_an_adapted_network_are_below_its_head():
    task = blobs()
    layer = maml(task)
    episode = task.sample(2, "test", torch.Generator().manual_seed(0))
    adapted = layer.adapt(episode.support)
    features = layer.adapted_features(adapted, episode.query.x)
    logits = features @ adapted["head.weight"].mT + adapted["head.bias"].unsqueeze(1)
    torch.testing.assert_close(logits, layer.predict(adapted, episode.query.x))


def test_a_plain_module_has_no_features_for_a_head():
    task = blobs()
    layer = MAML(torch.nn.Linear(6, 3), task, update=partial(SGD, lr=0.1), meta_gradient=Exact(), inner_steps=1)
    support = task.sample(1, "test", torch.Generator().manual_seed(0)).support
    with pytest.raises(UserError, match="MAML works on features"):
        layer.adapted_features(layer.adapt(support), support.x)


def test_an_ensemble_averages_probabilities_and_takes_the_moments_of_a_mixture():
    task = blobs()
    members = [maml(task) for _ in range(3)]
    episode = task.sample(2, "test", torch.Generator().manual_seed(0))
    together = Averaged(members)
    found = together.predict(together.adapt(episode.support), episode.query.x).softmax(-1)
    each = [m.predict(m.adapt(episode.support), episode.query.x).softmax(-1) for m in members]
    torch.testing.assert_close(found, sum(each) / 3)
    task = Sinusoid(k_shot=4, k_query=5)
    members = [
        ConditionalNeuralProcess(MLP(task.spec, hidden=[8]), task, hidden=[8], least_deviation=0.1) for _ in range(2)
    ]
    episode, together = task.sample(2, "test", torch.Generator().manual_seed(0)), Averaged(members)
    mixture = together.predict_distribution(together.adapt(episode.support), episode.query.x)
    one, two = (m.predict_distribution(m.adapt(episode.support), episode.query.x) for m in members)
    torch.testing.assert_close(mixture.prediction, (one.prediction + two.prediction) / 2)
    second = (one.variance + one.prediction**2 + two.variance + two.prediction**2) / 2
    torch.testing.assert_close(mixture.variance, second - mixture.prediction**2)


def test_queries_are_normalised_alike_in_predictions_and_in_distributions():
    task = blobs()
    layer = Prototypes(MLP(task.spec, hidden=[8], norm="batch"), task)
    episode = task.sample(2, "test", torch.Generator().manual_seed(0))
    adapted = layer.adapt(episode.support)
    for policy in ("support", "transductive", "inductive"):
        found = layer.query_distribution(adapted, episode, policy)
        torch.testing.assert_close(found.prediction, layer.predict_query(adapted, episode, policy))


def test_a_measure_has_a_column_for_each_predictor():
    task = blobs()
    layer = Prototypes(MLP(task.spec, hidden=[8]), task)
    measure = Uncertainty(
        tasks=8, validation_tasks=6, predictor={"temperature": Temperature(), "laplace": LaplaceHead(precisions=[1.0])}
    )
    found = measure.measure(layer, "test", 0)
    assert [heading.split(" (")[0] for heading in found.columns] == ["as trained", "temperature", "laplace"]
    rows = found.columns["as trained"]
    assert list(rows) == ["nll", "ece", "brier", "accuracy", "auroc_other_task"]
    judged = predicted_queries(layer, TaskSet(task, "test", tasks=8, seed=0), 0)
    assert rows["ece"].mean == pytest.approx(calibration.calibration_error(judged, 15).mean().item())
    assert all(math.isfinite(interval.half_width) for interval in rows.values())


def test_the_positions_of_a_sequence_are_queries():
    task = TextLists(k_shot=2, k_query=2, length=8)
    layer = InContext(GRU(task.spec, width=4), task)
    found = Uncertainty(tasks=3, validation_tasks=2, predictor={"temperature": Temperature()}).measure(layer, "test", 0)
    tasks = TaskSet(task, "test", tasks=3, seed=0)
    losses = task_values(layer, tasks, 0, device=torch.device("cpu"))["query_loss"]
    assert found.columns["as trained"]["nll"].mean == pytest.approx(losses.mean().item(), rel=1e-5)


# In use.

MEASURE = ["evaluation/measure=[uncertainty]", "evaluation.measure.uncertainty.tasks=4"]
FEW = [*MEASURE, "evaluation.measure.uncertainty.validation_tasks=3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two short runs with reliability diagrams."""
    folder = tmp_path_factory.mktemp("runs")
    shown = ["display=[reliability]", "display.reliability.tasks=4", "logger.figures=true"]
    for seed in (0, 1):
        options = ["algorithm=prototypes", "task=digits", f"seed={seed}", f"run_dir=r{seed}", "evaluation=none"]
        said = call(train.main, *options, *SHORT, *shown, folder=folder)
        assert said.exit_code == 0, said.err
    return folder


def test_a_training_draws_reliability_diagrams(runs):
    tags = EventAccumulator(str(runs / "r0")).Reload().Tags()
    assert "validation/reliability" in tags["images"]
    assert {"validation/ece", "validation/nll"} <= set(tags["scalars"])


def test_an_evaluation_has_the_measure_with_all_predictors_and_an_ensemble_as_a_baseline(runs):
    predictors = "evaluation/measure/uncertainty/predictor=[temperature,laplace,ensemble]"
    member = "evaluation.measure.uncertainty.predictor.ensemble.members=[r1]"
    file = "evaluation.baseline.ensemble.members=[r1/checkpoints/best.safetensors]"
    options = [*FEW, predictors, member, "evaluation/baseline=[ensemble]", file, "evaluation.tasks=3"]
    said = call(evaluate.main, "run=r0", *options, folder=runs)
    assert said.exit_code == 0, said.err
    report = json.loads((runs / "r0" / "evaluation.json").read_text())
    names = [heading.split(" (")[0] for heading in report["measures"]["uncertainty"]]
    assert names == ["as trained", "temperature", "laplace", "ensemble"]
    assert [row["method"] for row in report["rows"]][-1] == "ensemble"


def test_a_trained_run_states_its_distribution():
    task = Sinusoid(k_shot=4, k_query=5)
    stated = ConditionalNeuralProcess(MLP(task.spec, hidden=[8]), task, hidden=[8], least_deviation=0.1)
    support = task.sample(1, "test", torch.Generator().manual_seed(0)).support
    for layer in (stated, maml(task)):
        model = Trained(layer).adapt(support.x[0], support.y[0])
        found = model.predict_distribution([[0.5], [1.0]])
        torch.testing.assert_close(found.prediction, model.predict([[0.5], [1.0]]))
        assert (found.variance is not None) is (layer is stated)
        assert layer is not stated or found.variance.shape == (2, 1)


def test_faults_are_named_in_one_line(runs):
    cases = {
        "evaluation.measure.uncertainty.bins=0": "evaluation.measure.uncertainty.bins=0: must be at least 1",
        "evaluation.measure.uncertainty.tasks=1": "evaluation.measure.uncertainty.tasks=1: must be at least 2",
    }
    for option, line in cases.items():
        said = call(evaluate.main, "run=r0", *FEW, option, folder=runs)
        assert said.exit_code == 2 and said.err.strip() == line
    none = ["evaluation/baseline=[ensemble]", "evaluation.baseline.ensemble.members=[nowhere]"]
    said = call(evaluate.main, "run=r0", "evaluation.tasks=3", *none, folder=runs)
    assert said.exit_code == 2 and said.err.strip() == "nowhere: there is no such run folder"


def test_a_laplace_head_of_a_sequence_is_refused():
    measure = Uncertainty(predictor={"laplace": LaplaceHead(precisions=[1.0])})
    with pytest.raises(UserError, match="is for a regression or a classification"):
        measure.check(TextLists(k_shot=2, k_query=2, length=8))
