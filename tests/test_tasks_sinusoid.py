"""Sinusoids are drawn as the paper says."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import optimize, stats

from mlframework.tasks import Sinusoid


def drawn(tasks: int = 2000):
    return Sinusoid(k_shot=10, k_query=20).sample(tasks, "train", torch.Generator().manual_seed(0)).joined()


def test_inputs_are_uniform_on_minus_five_to_five():
    x = drawn().x.flatten().double().numpy()
    assert stats.kstest(x[:20000], stats.uniform(-5, 10).cdf).pvalue > 0.001


def test_every_task_is_one_wave_whose_amplitude_and_phase_are_uniform():
    """Least squares on sin and cos recovers both, by a method that shares nothing with the generator."""
    examples = drawn()
    x, y = examples.x.double().squeeze(-1).numpy(), examples.y.double().squeeze(-1).numpy()
    amplitudes, phases = [], []
    for one_x, one_y in zip(x, y, strict=True):
        basis = np.stack([np.sin(one_x), np.cos(one_x)], axis=1)
        (a, b), residual, *_ = np.linalg.lstsq(basis, one_y, rcond=None)
        assert residual.sum() < 1e-9
        amplitudes.append(math.hypot(a, b))  # a = A cos(phase), b = -A sin(phase)
        phases.append(math.atan2(-b, a))
    assert stats.kstest(amplitudes, stats.uniform(0.1, 4.9).cdf).pvalue > 0.001
    assert stats.kstest(phases, stats.uniform(0, math.pi).cdf).pvalue > 0.001


def test_frequency_is_one():
    """A free fit of the frequency finds one."""
    examples = drawn(1)
    x, y = examples.x[0, :, 0].double().numpy(), examples.y[0, :, 0].double().numpy()
    found, _ = optimize.curve_fit(lambda t, a, w, p: a * np.sin(w * t - p), x, y, p0=[2.0, 1.05, 1.0])
    assert abs(abs(found[1]) - 1) < 1e-4
