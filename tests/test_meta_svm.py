"""The Meta-SVM family: each member is the optimum that scikit-learn finds, differentiable, and says how it fared."""

from __future__ import annotations

import functools
import json
import logging

import numpy as np
import pytest
import sklearn.kernel_ridge
import sklearn.linear_model
import sklearn.svm
import torch
from commands import SHORT, call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mlframework.backend.machine import PeakMemory
from mlframework.base_layers import MLP, BaseLayer
from mlframework.cli import evaluate, train
from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.meta_layers import (
    CrammerSingerSVM,
    KernelMachine,
    LinearKernel,
    Logistic,
    OneVsRestSVM,
    RBFKernel,
    Ridge,
)
from mlframework.solvers.support_vectors import Solution
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid
from mlframework.testing import check_meta_layer
from mlframework.training.meta_gradient import meta_gradient

KERNELS = {
    "linear": LinearKernel,
    "with an offset": lambda: LinearKernel(constant=0.7),
    "rbf": lambda: RBFKernel(gamma=0.6),
}


def blobs(**settings) -> ArrayTasks:
    """Overlapping classes of 6 features, so that some examples are at their bound and some are not."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 6
    x = torch.randn(6, 6, generator=generator, dtype=torch.float64)[y] + torch.randn(60, 6, generator=generator)
    data = ClassIndexed.from_labels(x, y)
    splits = dict.fromkeys(("train", "validation", "test"), data)
    return ArrayTasks(splits, **{"n_way": 3, "k_shot": [1, 4], "k_query": 2, **settings})


def draw(task, num_tasks: int = 4):
    """An episode in float64."""
    episode = task.sample(num_tasks, "train", torch.Generator().manual_seed(1))
    return type(episode)(
        *(Examples(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in part)) for part in episode)
    )


def on_inputs(member, task, **settings):
    """A member on the inputs themselves."""
    return member(BaseLayer(nn.Flatten(), nn.Identity()), task, **settings).double()


def maps(kernel, support: torch.Tensor, query: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features of one task's support and query examples whose scalar products are the kernel's values."""
    both = torch.cat([support, query]).unsqueeze(0)
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(kernel.double()(both, both)[0])
    features = (vectors * values.clamp(min=0).sqrt()).numpy()
    return features[: len(support)], features[len(support) :]


def with_own_features(x: np.ndarray, reg: float, rows: int) -> np.ndarray:
    """Features `[x_i, sqrt(reg) e_i]` of `rows` support examples, or `[x, 0]` of a query."""
    return np.hstack([x, np.sqrt(reg) * np.eye(len(x), rows) if len(x) == rows else np.zeros((len(x), rows))])


def margins(multi_class: str):
    def reference(x, y, query, *, c, reg):
        settings = {"multi_class": multi_class, "loss": "hinge", "C": c, "fit_intercept": False}
        model = sklearn.svm.LinearSVC(**settings, tol=1e-9, max_iter=10**6)
        model.fit(with_own_features(x, reg, len(x)), y)
        return query @ model.coef_[:, : x.shape[1]].T

    return reference


def ridge(x, y, query, *, reg):
    return sklearn.linear_model.Ridge(alpha=reg, fit_intercept=False).fit(x, np.eye(3)[y]).predict(query)


def logistic(x, y, query, *, reg):
    model = sklearn.linear_model.LogisticRegression(C=1 / reg, fit_intercept=False, tol=1e-13, max_iter=10**5)
    found = model.fit(x, y).decision_function(query)
    return found - found.mean(1, keepdims=True)


#: Each with its numbers and what scikit-learn makes of one task.
MEMBERS = {
    "crammer_singer": (CrammerSingerSVM, {"c": 0.3, "reg": 0.8}, margins("crammer_singer")),
    "one_vs_rest": (OneVsRestSVM, {"c": 0.3, "reg": 0.8}, margins("ovr")),
    "ridge": (Ridge, {"reg": 0.8}, ridge),
    "logistic": (Logistic, {"reg": 0.8}, logistic),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MEMBERS)
def test_predictions_are_those_of_scikit_learn_on_support_sets_of_any_size(name, kernel):
    member, settings, reference = MEMBERS[name]
    task = blobs()
    layer = on_inputs(member, task, kernel=KERNELS[kernel](), scale=2.5, **settings)
    support, query = draw(task)
    found = layer.predict(layer.adapt(support), query.x, query.mask).detach() / 2.5
    assert len({int(mask.sum()) for mask in support.mask}) > 1
    for number, mask in enumerate(support.mask):
        counted = mask > 0
        x, asked = maps(layer.kernel, support.x[number, counted], query.x[number])
        expected = reference(x, support.y[number, counted].numpy(), asked, **settings)
        # liblinear stops at about 1e-6, whatever it is asked.
        np.testing.assert_allclose(found[number].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ridge_predicts_values_as_kernel_ridge_does_without_a_scale(kernel, float64):
    task = Sinusoid(k_shot=6, k_query=5)
    layer = on_inputs(Ridge, task, kernel=KERNELS[kernel](), reg=0.3)
    support, query = draw(task)
    found = layer.predict(layer.adapt(support), query.x).detach()
    for number in range(len(found)):
        x, asked = maps(layer.kernel, support.x[number], query.x[number])
        model = sklearn.kernel_ridge.KernelRidge(alpha=0.3).fit(x, support.y[number].numpy())
        np.testing.assert_allclose(found[number].numpy(), model.predict(asked), atol=1e-9)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} <= {
        "positive.logarithms.reg",
        "kernel.positive.logarithms.gamma",
    }


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_ridge_by_features_is_scikit_learns_in_float32_where_it_hardly_regularises(constant):
    """The coefficients of the 200 examples are thousands of times as large as the predictions that they add up to."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(200, 20, generator=generator), torch.randn(20, generator=generator)
    y = x @ weights + 0.1 * torch.randn(200, generator=generator)
    layer = on_inputs(Ridge, Sinusoid(k_shot=6, k_query=5), kernel=LinearKernel(constant), reg=1e-3).float()
    support = Examples(x[None], y[None, :, None], torch.ones(1, 200))
    fitted = layer.fit(support.x, support)
    found = layer.outputs(fitted, 10 * x[None, :50])[0, :, 0].detach().numpy()
    inputs, asked = (layer.kernel.features(rows[None].double())[0].numpy() for rows in (x, 10 * x[:50]))
    expected = sklearn.linear_model.Ridge(alpha=1e-3, fit_intercept=False).fit(inputs, y.numpy()).predict(asked)
    assert fitted.solution.converged.all() and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MEMBERS)
def test_everything_may_be_learned_and_the_gradient_is_exact(name, kernel):
    member, settings, _ = MEMBERS[name]

    def make(task):
        learn = [*settings, "scale"]
        return member(MLP(task.spec, hidden=[5]), task, kernel=KERNELS[kernel](), learn=learn, **settings)

    check_meta_layer(make, blobs(k_shot=3))


@pytest.mark.parametrize(("dtype", "offset", "near"), [(torch.float64, 1e6, 1e-12), (torch.float32, 100.0, 1e-6)])
def test_an_rbf_kernel_is_that_of_the_differences_far_from_the_origin_too(dtype, offset, near):
    a, b = torch.randn(2, 5, 3, dtype=dtype) + offset, torch.randn(2, 4, 3, dtype=dtype) + offset
    b[:, :2] = a[:, :2]
    kernel = RBFKernel(gamma=0.6, learn=False).to(dtype)
    gamma = kernel.positive["gamma"].double()
    wanted = (-gamma * (a.double().unsqueeze(2) - b.double().unsqueeze(1)).square().mean(-1)).exp()
    torch.testing.assert_close(kernel(a, b).double(), wanted, rtol=0, atol=near)
    if dtype is torch.float64:
        both = (torch.randn(1, 3, 2, dtype=dtype, requires_grad=True),)
        assert torch.autograd.gradcheck(lambda x: kernel(x, x), both)
        assert torch.autograd.gradgradcheck(lambda x: kernel(x, x), both)


def test_an_rbf_kernel_holds_no_differences_of_all_pairs():
    x = torch.randn(1, 300, 100)
    with PeakMemory() as memory, torch.no_grad():
        RBFKernel()(x, x)
    assert memory.peak < 300 * 300 * 100  # bytes; the differences take four times as many


@pytest.mark.parametrize(("c", "binds"), [(0.05, True), (1e3, False)])
def test_c_gets_a_gradient_where_an_example_is_at_its_bound_and_zero_elsewhere(c, binds):
    task = blobs()
    layer = on_inputs(CrammerSingerSVM, task, kernel=LinearKernel(), c=c, learn=["c"])
    meta_gradient(layer, draw(task))
    assert (float(layer.positive.logarithms["c"].grad.abs()) > 1e-6) is binds


def test_what_is_not_learned_stays_and_needs_no_gradient():
    task = blobs()
    layer = CrammerSingerSVM(MLP(task.spec, hidden=[5]), task, kernel=RBFKernel(learn=False), learn=[]).double()
    meta_gradient(layer, draw(task))
    learned = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert all(name.startswith("base_layer.") for name in learned)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of `algorithm=svm`."""
    folder = tmp_path_factory.mktemp("run")
    said = call(train.main, "algorithm=svm", "task=digits", "run_dir=r", "evaluation=none", *SHORT, folder=folder)
    assert said.exit_code == 0, said.err
    return folder / "r"


def test_the_solver_reports_to_tensorboard(run):
    events = EventAccumulator(str(run)).Reload()
    for split in ("train", "validation"):
        assert [event.value for event in events.Scalars(f"{split}/solver_converged")] == [1.0]
        assert 0 <= events.Scalars(f"{split}/solver_residual")[-1].value <= 1e-9
    assert events.Scalars("train/scale")[-1].value == pytest.approx(10, abs=0.1)


@pytest.mark.slow
def test_any_estimator_of_scikit_learn_is_judged_on_a_run_s_features(run):
    options = ["evaluation/baseline/on_features=[svc,logistic_regression]", "evaluation.baseline.on_features.svc.C=3"]
    own = ["+evaluation.baseline.on_features.near._target_=sklearn.neighbors.KNeighborsClassifier"]
    few = [
        "evaluation.tasks=3",
        "evaluation.validation_tasks=4",
        "evaluation/baseline=[scikit_learn]",
        "+evaluation.baseline.on_features.near.n_neighbors=1",
    ]
    said = call(evaluate.main, "run=r", *options, *own, *few, folder=run.parent)
    assert said.exit_code == 0, said.err
    report = json.loads((run / "evaluation.json").read_text())
    assert [row["method"] for row in report["rows"] if row["method"].endswith("on features")] == [
        "svc on features",
        "logistic_regression on features",
        "near on features",
    ]


def test_an_estimator_that_does_not_fit_the_task_is_refused_before_training(tmp_path):
    said = call(train.main, "task=digits", "evaluation/baseline/on_features=[ridge]", *SHORT, folder=tmp_path)
    assert said.exit_code == 2
    line = "evaluation.baseline.on_features.ridge=Ridge: takes a regression, and Digits is a classification"
    assert said.err.strip() == line
    assert not any(tmp_path.iterdir())


class OneStep(KernelMachine):
    """Ridge regression by a single step of gradient descent, which is far from enough, and says so."""

    def __init__(self, base_layer, task):
        numbers = {"kernel": LinearKernel(), "positive": {}, "learn": [], "frozen": None, "batch_norm": "support"}
        super().__init__(base_layer, task, **numbers)

    def solve(self, kernel, targets, mask):
        dual = 0.01 * targets
        residual = (kernel @ dual + dual - targets).abs().amax((1, 2))
        return Solution(dual, residual, residual < 1e-6)


def test_tasks_that_did_not_converge_are_said_aloud_once_and_reported_each_time(caplog):
    task = blobs()
    layer = on_inputs(OneStep, task)
    episode = draw(task)
    with caplog.at_level(logging.WARNING):
        metrics = [layer.query_metrics(layer.adapt(episode.support), episode) for _ in range(3)]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "OneStep: the solver did not converge in 4 of 4 tasks"
    ]
    for found in metrics:
        assert found["solver_converged"].tolist() == [0.0] * 4
        assert (found["solver_residual"] > 0.1).all()


def test_features_that_are_not_finite_end_in_a_loss_that_is_not_finite():
    task = blobs()
    episode = draw(task)
    x = episode.support.x.clone()
    x[1, 0] = torch.nan
    episode = episode._replace(support=episode.support._replace(x=x))
    for member, settings, _ in MEMBERS.values():
        layer = on_inputs(member, task, kernel=LinearKernel(), **settings)
        metrics = layer.query_metrics(layer.adapt(episode.support), episode)
        assert metrics["query_loss"].isfinite().tolist() == [True, False, True, True], member
        assert metrics["solver_converged"].tolist() == [1.0, 0.0, 1.0, 1.0], member


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (functools.partial(CrammerSingerSVM, kernel=LinearKernel(), c=0.0), "c=0.0: must be above 0"),
        (functools.partial(Ridge, kernel=LinearKernel(), reg=-1.0), "reg=-1.0: must be above 0"),
        (
            functools.partial(Logistic, kernel=LinearKernel(), learn=["c"]),
            r"learn=\['c'\]: must hold some of reg, scale",
        ),
    ],
)
def test_wrong_settings_are_named(make, line):
    task = blobs()
    with pytest.raises(InvalidValue, match=line):
        make(MLP(task.spec, hidden=[5]), task)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: RBFKernel(gamma=0), "gamma=0: must be above 0"),
        (lambda: LinearKernel(constant=-1), "constant=-1: must be at least"),
    ],
)
def test_wrong_settings_of_a_kernel_are_named(make, line):
    with pytest.raises(InvalidValue, match=line):
        make()


def test_a_kernel_of_ones_own_says_what_it_reports():
    class Scaled(LinearKernel):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, a, b):
            return self.w * super().forward(a, b)

        def learned(self):
            return {"w": self.w.detach()}

    task = Sinusoid(k_shot=3, k_query=3)
    layer = Ridge(MLP(task.spec, hidden=[4]), task, kernel=Scaled())
    support = task.sample(2, "train", torch.Generator().manual_seed(0)).support
    assert layer.diagnostics(layer.adapt(support))["w"].tolist() == [2.0, 2.0]
