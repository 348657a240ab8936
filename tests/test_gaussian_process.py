"""The exact posterior: scikit-learn's, differentiable, and blind to padding; deep kernels are such processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, Matern
from torch import nn
from torch.autograd import gradcheck

from mlframework.base_layers import MLP, BaseLayer
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.meta_layers import CosineKernel, DeepKernel, LinearKernel, MaternKernel, RBFKernel
from mlframework.solvers.gaussian_process import condition, log_marginal_likelihood, posterior
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid
from mlframework.testing import check_meta_layer, directional_errors

VARIANCE, NOISE, D = 1.7, 0.05, 3
ROOT = D**0.5

#: Our kernels, each with scikit-learn's on features of size 3.
KERNELS = {
    "rbf": (lambda: RBFKernel(gamma=0.4, learn=False), RBF(length_scale=(D / 0.8) ** 0.5)),
    "linear": (lambda: LinearKernel(constant=0.5), DotProduct(sigma_0=0.5**0.5)),
    "matern 0.5": (lambda: MaternKernel(0.5, 0.8, learn=False), Matern(length_scale=0.8 * ROOT, nu=0.5)),
    "matern 1.5": (lambda: MaternKernel(1.5, 0.8, learn=False), Matern(length_scale=0.8 * ROOT, nu=1.5)),
    "matern 2.5": (lambda: MaternKernel(2.5, 0.8, learn=False), Matern(length_scale=0.8 * ROOT, nu=2.5)),
}

pytestmark = pytest.mark.usefixtures("float64")


def examples(tasks=3, n=7, k=2):
    return torch.randn(tasks, n, D), torch.randn(tasks, n, k)


def scaled(make):
    """The kernel, times the variance of the process."""
    kernel = make()
    return lambda a, b: VARIANCE * kernel(a, b)


def diagonal(kernel, x):
    return kernel(x, x).diagonal(dim1=-2, dim2=-1)


@pytest.mark.parametrize("name", KERNELS)
def test_mean_variance_and_likelihood_are_those_of_scikit_learn(name):
    make, theirs = KERNELS[name]
    (x, y), (asked, _) = examples(), examples(n=5)
    kernel = scaled(make)
    seen = condition(kernel(x, x), y, noise=NOISE)
    mean, variance = posterior(seen, kernel(asked, x), diagonal(kernel, asked))
    likelihood = log_marginal_likelihood(seen, y)
    for task in range(len(x)):
        model = GaussianProcessRegressor(ConstantKernel(VARIANCE) * theirs, alpha=NOISE, optimizer=None)
        model.fit(x[task].numpy(), y[task].numpy())
        expected, deviation = model.predict(asked[task].numpy(), return_std=True)
        np.testing.assert_allclose(mean[task].numpy(), expected, rtol=0, atol=1e-8)
        np.testing.assert_allclose(variance[task].numpy(), deviation[:, 0] ** 2, rtol=0, atol=1e-8)
        assert float(likelihood[task].sum()) == pytest.approx(model.log_marginal_likelihood_value_, abs=1e-8)


def test_the_likelihood_is_the_density_of_a_normal_vector():
    x, y = examples(k=1)
    kernel = scaled(KERNELS["rbf"][0])(x, x)
    found = log_marginal_likelihood(condition(kernel, y, noise=NOISE), y)
    for task in range(len(x)):
        covariance = kernel[task].numpy() + NOISE * np.eye(7)
        assert float(found[task]) == pytest.approx(multivariate_normal.logpdf(y[task, :, 0], cov=covariance), abs=1e-9)


def test_one_example_by_hand():
    """k(x, x) = 2, noise 1, y = 3; a query with k(q, x) = 1, k(q, q) = 2: mean 1 * 3 / 3, variance 2 - 1 * 1 / 3."""
    seen = condition(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0), noise=1.0)
    mean, variance = posterior(seen, torch.ones(1, 1, 1), torch.full((1, 1), 2.0))
    assert (float(mean), float(variance)) == pytest.approx((1.0, 5 / 3))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_finite_differences(masked):
    (x, y), (asked, _) = examples(tasks=2, n=5), examples(tasks=2, n=3)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]) if masked else None

    def everything(x, y, asked, noise):
        kernel = scaled(KERNELS["rbf"][0])
        seen = condition(kernel(x, x), y, noise=noise, mask=mask)
        cross = kernel(asked, x) * (1 if mask is None else mask.unsqueeze(1))
        return *posterior(seen, cross, diagonal(kernel, asked)), log_marginal_likelihood(seen, y, mask)

    inputs = [each.requires_grad_() for each in (x, y, asked, torch.tensor([0.05, 0.2]))]
    assert gradcheck(everything, inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_no_part_of_a_task_whatever_it_holds(dtype):
    (x, y), (asked, _) = examples(), examples(n=4)
    kernel, mask = scaled(KERNELS["rbf"][0]), torch.ones(3, 7)
    mask[0, 4:] = 0
    mask[1, 2] = 0
    inner = kernel(x, x)
    inner[0, 4:], inner[0, :, 4:], y[0, 4:] = torch.nan, torch.nan, torch.nan
    cross = kernel(asked, x) * mask.unsqueeze(1)
    seen = condition(inner.to(dtype), y.to(dtype), noise=NOISE, mask=mask)
    found = *posterior(seen, cross.to(dtype), diagonal(kernel, asked)), log_marginal_likelihood(seen, y.to(dtype), mask)
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype is torch.float32 else 1e-11}
    for task, counts in enumerate(mask > 0):
        rows, alone = x[task : task + 1, counts], y[task : task + 1, counts]
        other = condition(kernel(rows, rows), alone, noise=NOISE)
        asked_one = asked[task : task + 1]
        moments = posterior(other, kernel(asked_one, rows), diagonal(kernel, asked_one))
        for ours, theirs in zip(found, (*moments, log_marginal_likelihood(other, alone)), strict=True):
            torch.testing.assert_close(ours[task], theirs[0], **tolerance)


def test_all_tasks_together_equal_one_at_a_time():
    x, y = examples(tasks=5)
    kernel = scaled(KERNELS["matern 2.5"][0])(x, x)
    together = condition(kernel, y, noise=NOISE)
    for task in range(5):
        alone = condition(kernel[task : task + 1], y[task : task + 1], noise=NOISE)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[task], other[0], rtol=0, atol=1e-13)


def test_the_smallest_jitter_that_helps_is_added_to_the_tasks_that_need_it():
    x, y = examples(tasks=2, n=6)
    kernel = scaled(KERNELS["rbf"][0])(x, x)
    kernel[1] = kernel[1] + torch.eye(6) * (-1e-9 - torch.linalg.eigvalsh(kernel[1])[0])  # least eigenvalue: -1e-9
    seen = condition(kernel, y, noise=0.0)
    largest = float(kernel[1].diagonal().max())
    assert seen.jitter.tolist() == pytest.approx([0.0, 1e-8 * largest])
    matrix = kernel + seen.jitter[:, None, None] * torch.eye(6)
    torch.testing.assert_close(seen.factor @ seen.factor.mT, matrix, rtol=0, atol=1e-12)


def test_a_matrix_that_no_jitter_saves_is_said_to_be_broken_and_spoils_no_other_task():
    x, y = examples(tasks=2, n=4)
    kernel = scaled(KERNELS["rbf"][0])(x, x)
    kernel[1] -= 10 * torch.eye(4)
    seen = condition(kernel, y, noise=0.0)
    assert seen.jitter.isfinite().tolist() == [True, False]
    assert seen.dual[0].isfinite().all() and seen.dual[1].isnan().all()


# Deep kernels.


def blobs(**settings):
    y = torch.arange(60) % 6
    x = torch.randn(6, D)[y] * 2 + torch.randn(60, D)
    data = ClassIndexed.from_labels(x, y)
    splits = dict.fromkeys(("train", "validation", "test"), data)
    return ArrayTasks(splits, **{"n_way": 3, "k_shot": [1, 4], "k_query": 2, **settings})


def on_inputs(task, **settings):
    """A process on the inputs themselves."""
    settings = {"variance": VARIANCE, "noise": NOISE, "least_noise": 0.0, "kernel": RBFKernel(gamma=0.4), **settings}
    return DeepKernel(BaseLayer(nn.Flatten(), nn.Identity()), task, **settings)


def draw(task, num_tasks=3):
    return task.sample(num_tasks, "train", torch.Generator().manual_seed(1))


def doubled(episode):
    return Episode(*(Examples(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in p)) for p in episode))


def test_a_regression_predicts_as_scikit_learn_with_the_noise_in_the_variance():
    task = Sinusoid(k_shot=6, k_query=5)
    layer = on_inputs(task)
    with torch.no_grad():
        layer.offset += 0.3
        support, query = doubled(draw(task))
        found = layer.predict_distribution(layer.adapt(support), query.x)
    theirs = ConstantKernel(VARIANCE) * RBF(length_scale=(1 / 0.8) ** 0.5)
    for number in range(3):
        model = GaussianProcessRegressor(theirs, alpha=NOISE, optimizer=None)
        model.fit(support.x[number].numpy(), support.y[number].numpy() - 0.3)
        mean, deviation = model.predict(query.x[number].numpy(), return_std=True)
        np.testing.assert_allclose(found.prediction[number, :, 0].numpy() - 0.3, mean, atol=1e-7)
        np.testing.assert_allclose(found.variance[number, :, 0].numpy(), deviation**2 + NOISE, atol=1e-7)


def test_a_classification_is_a_regression_for_each_class_on_support_sets_of_any_size():
    task = blobs()
    layer = on_inputs(task)
    with torch.no_grad():
        support, query = doubled(draw(task))
        found = layer.predict(layer.adapt(support), query.x).softmax(-1)
    assert len({int(mask.sum()) for mask in support.mask}) > 1
    theirs = ConstantKernel(VARIANCE) * RBF(length_scale=(D / 0.8) ** 0.5)
    for number, counts in enumerate(support.mask > 0):
        columns = []
        for label in range(3):
            model = GaussianProcessRegressor(theirs, alpha=NOISE, optimizer=None)
            signs = np.where(support.y[number, counts].numpy() == label, 1.0, -1.0)
            mean, deviation = model.fit(support.x[number, counts].numpy(), signs).predict(
                query.x[number].numpy(), return_std=True
            )
            columns.append(norm.cdf(mean / np.sqrt(deviation**2 + NOISE)))
        expected = np.stack(columns, axis=-1)
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-7)


def test_far_from_all_examples_classes_are_alike_and_a_value_has_the_prior_s_variance():
    task = blobs()
    layer = on_inputs(task)
    adapted = layer.adapt(draw(task).support)
    far = layer.predict(adapted, torch.full((3, 1, D), 1e3)).softmax(-1)
    torch.testing.assert_close(far, torch.full_like(far, 1 / 3))
    task = Sinusoid(k_shot=6)
    layer = on_inputs(task)
    found = layer.predict_distribution(layer.adapt(draw(task).support), torch.full((3, 1, 1), 1e3))
    torch.testing.assert_close(found.variance, torch.full_like(found.variance, VARIANCE + NOISE), rtol=1e-6, atol=0)


MAKERS = {
    "rbf": RBFKernel,
    "matern": lambda: MaternKernel(1.5),
    "linear": lambda: LinearKernel(constant=1.0),
    "cosine": CosineKernel,
}


def deep(task, **settings):
    return DeepKernel(MLP(task.spec, hidden=[8, 8]), task, **settings)


@pytest.mark.parametrize("make_task", [lambda: Sinusoid(k_shot=5, k_query=5), blobs], ids=["regression", "classes"])
@pytest.mark.parametrize("kernel", MAKERS)
@pytest.mark.parametrize("loss", ["marginal", "predictive"])
def test_the_meta_gradient_is_that_of_the_loss(loss, kernel, make_task):
    task = make_task()
    layer = deep(task, kernel=MAKERS[kernel](), loss=loss)
    losses_of = lambda layer, episode: layer.meta_loss(episode)[0].detach()  # noqa: E731
    errors = directional_errors(layer, doubled(draw(task)), losses_of=losses_of)
    assert float(errors.median()) < 1e-6


@pytest.mark.parametrize("make_task", [lambda: Sinusoid(k_shot=5, k_query=5), blobs], ids=["regression", "classes"])
def test_a_predictive_loss_keeps_the_contract(make_task):
    """`algorithm=deep_kernel`, whose loss is marginal, is checked with all other presets."""
    check_meta_layer(lambda task: deep(task, kernel=RBFKernel(), loss="predictive"), make_task())


def test_the_marginal_loss_is_that_of_all_examples_of_a_task_per_example():
    task = Sinusoid(k_shot=4, k_query=3)
    layer, episode = on_inputs(task), doubled(draw(task))
    losses, metrics = layer.meta_loss(episode)
    both = episode.joined()
    for number in range(3):
        gaps = (both.x[number] - both.x[number].mT).square()
        covariance = VARIANCE * torch.exp(-0.4 * gaps) + NOISE * torch.eye(7)
        expected = -multivariate_normal.logpdf(both.y[number, :, 0].numpy(), cov=covariance.numpy()) / 7
        assert losses[number].item() == pytest.approx(expected, abs=1e-6)
    assert {"query_loss", "query_nll", "noise", "variance", "gamma", "jitter"} <= metrics.keys()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"loss": "mll"}, "loss=mll: must be one of marginal, predictive"),
        ({"noise": 0.0}, "noise=0.0: must be above 0"),
        ({"least_noise": -1.0}, "least_noise=-1.0: must be at least 0"),
        ({"learn": ["gamma"]}, r"learn=\['gamma'\]: must hold some of variance, noise"),
    ],
)
def test_wrong_settings_are_named(settings, line):
    with pytest.raises(InvalidValue, match=line):
        on_inputs(Sinusoid(), **settings)


def test_a_marginal_likelihood_refuses_a_normalisation_of_single_queries():
    task = blobs()
    network = MLP(task.spec, hidden=[4], norm="batch")
    with pytest.raises(InvalidValue, match="batch_norm=inductive: a marginal likelihood needs one"):
        DeepKernel(network, task, kernel=RBFKernel(), batch_norm="inductive")
    DeepKernel(network, task, kernel=RBFKernel(), batch_norm="inductive", loss="predictive")


def test_wrong_smoothness_is_named():
    with pytest.raises(InvalidValue, match=r"smoothness=2.0: must be 0.5, 1.5 or 2.5"):
        MaternKernel(2.0)
