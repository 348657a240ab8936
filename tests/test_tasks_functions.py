"""Random functions of one number are drawn as their docstrings say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.gaussian_process import kernels

from mlframework.errors import InvalidValue
from mlframework.evaluation import TaskSet
from mlframework.tasks import CorrelatedOutputs, Cubics, DampedOscillator, GaussianProcess, Sinusoid, Steps

RESULTS = Path(__file__).parents[1] / "results"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def values(task, x, tasks=1, seed=0):
    """The functions of some tasks at places `[n]`: `[tasks, n, outputs]`."""
    places = torch.as_tensor(x, dtype=torch.float64).expand(tasks, -1)[..., None]
    return task.draw(tasks, seeded(seed))(places)


def test_sinusoids_are_still_the_tasks_of_the_published_results():
    stored = json.loads((RESULTS / "sinusoid_10shot_maml.json").read_text())["evaluation"]
    assert TaskSet(Sinusoid(), "test", tasks=stored["tasks"], seed=stored["seed"]).hash() == stored["task_hash"]


KERNELS = {
    "rbf": kernels.RBF(0.7),
    "matern": kernels.Matern(0.7, nu=2.5),
    "periodic": kernels.ExpSineSquared(0.7, 1.5),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_gaussian_process_has_the_covariance_of_scikit_learn(name):
    task = GaussianProcess(5, 5, kernel=name, length=0.7, period=1.5, deviation=1.3)
    x = torch.linspace(-5, 5, 12, dtype=torch.float64)[None, :, None]
    np.testing.assert_allclose(task.covariance(x)[0], 1.3**2 * KERNELS[name](x[0].numpy()), atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_draws_of_a_gaussian_process_are_standard_normal_once_whitened(name):
    task = GaussianProcess(5, 5, kernel=name, length=0.7, period=1.5, noise=0.1, outputs=2)
    x = torch.linspace(-5, 5, 6, dtype=torch.float64)
    drawn = values(task, x, tasks=2000)
    covariance = KERNELS[name](x[:, None].numpy()) + 0.1**2 * np.eye(6)
    white = np.linalg.solve(np.linalg.cholesky(covariance), drawn.movedim(0, 1).flatten(1).numpy())
    assert stats.kstest(white.flatten(), "norm").pvalue > 0.001
    assert abs(np.corrcoef(white) - np.eye(6)).max() < 4 / math.sqrt(white.shape[1])


def test_steps_are_constant_between_their_jumps():
    y = values(Steps(5, 5, jumps=3, outputs=2), np.linspace(-5, 5, 4001), tasks=200)
    jumps = (y.diff(dim=1) != 0).sum(1)
    assert jumps.max() == 3
    # Two of three jumps lie within one of 4000 spaces once in 1,300 functions.
    assert (jumps == 3).double().mean() > 0.98
    assert stats.kstest(y[:, 0].flatten(), stats.uniform(-3, 6).cdf).pvalue > 0.001


def test_cubics_are_polynomials_of_degree_three_with_uniform_coefficients():
    x = np.linspace(-5, 5, 9)
    y = values(Cubics(5, 5, outputs=2), x, tasks=1000).movedim(0, 1).flatten(1).numpy()
    coefficients, residual, *_ = np.polynomial.polynomial.polyfit(x / 5, y, 3, full=True)
    assert residual[0].max() < 1e-20
    for row in coefficients:
        assert stats.kstest(row, stats.uniform(-3, 6).cdf).pvalue > 0.001


def test_a_damped_oscillator_obeys_its_differential_equation():
    """On a grid of step h, `y'' + 2 g y' + (g^2 + w^2) y = 0` is a linear recurrence; least squares finds g and w."""
    h = 0.4
    y = values(DampedOscillator(5, 5), h * np.arange(25), tasks=1000).squeeze(-1).numpy()
    decays, frequencies = [], []
    for one in y:
        (a, b), residual, *_ = np.linalg.lstsq(np.stack([one[1:-1], -one[:-2]], 1), one[2:], rcond=None)
        assert residual.sum() < 1e-18
        decays.append(-math.log(b) / (2 * h))
        frequencies.append(math.acos(a / (2 * math.sqrt(b))) / h)
    assert stats.kstest(decays, stats.uniform(0.05, 0.45).cdf).pvalue > 0.001
    assert stats.kstest(frequencies, stats.uniform(0.5, 2.5).cdf).pvalue > 0.001


def test_correlated_outputs_are_mixtures_of_the_latent_draws():
    task = CorrelatedOutputs(5, 5, outputs=4, latent=2, length=1.5)
    y = values(task, np.linspace(-5, 5, 9), tasks=20000)
    singular = torch.linalg.svdvals(y)
    assert (singular[:, 2:] < 1e-10).all()
    assert (singular[:, 1] > 1e-3).double().mean() > 0.99
    assert abs(float(y.var()) - 1) < 0.03  # weights have a variance of 1 / latent
    # Over tasks, outputs do not correlate; two outputs share their draws, so that a product's variance is 2.
    assert abs(np.corrcoef(y[:, 4].T.numpy()) - np.eye(4)).max() < 4.5 * math.sqrt(2 / 20000)


@pytest.mark.parametrize("kind", [Sinusoid, Steps, Cubics, GaussianProcess, CorrelatedOutputs])
def test_places_are_uniform(kind):
    x = kind(10, 10).sample(500, "train", seeded()).joined().x
    assert stats.kstest(x.flatten().double(), stats.uniform(-5, 10).cdf).pvalue > 0.001


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: GaussianProcess(5, 5, kernel="rfb"), r"kernel=rfb: must be one of rbf, .* \(did you mean rbf\?\)"),
        (lambda: GaussianProcess(5, 5, length=0.0), "length=0.0: must be above 0"),
        (lambda: GaussianProcess(5, 5, noise=-1.0), "noise=-1.0: must be at least 0"),
        (lambda: Steps(5, 5, jumps=0), "jumps=0: must be a whole number of at least 1"),
        (lambda: Cubics(0, 5), "k_shot=0: must be a whole number of at least 1"),
        (lambda: CorrelatedOutputs(5, 5, outputs=0), "outputs=0: must be a whole number of at least 1"),
    ],
)
def test_a_wrong_setting_is_one_line(make, line):
    with pytest.raises(InvalidValue, match=line):
        make()
