"""Means with their 95 % intervals: over tasks, and over the sources of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.evaluation.number_format import shown_interval

__all__ = ["Interval", "Sources", "half_width_over_sources"]

#: The sources of each task: a language, a role; the characters of a classification.
Sources = Sequence[tuple[str, ...]]

#: Above this share of pairs of tasks with a common source, the sources are too few for an interval.
MOST_SHARED = 0.5


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval over tasks, by Student's t, and that over the sources of the tasks."""

    mean: float
    half_width: float  # `mean - half_width` to `mean + half_width` is the interval; NaN for a single value
    values: int  # how many there were
    over_sources: float | None = (
        None  # see `half_width_over_sources`; None: each task is a source, or these are too few
    )

    @classmethod
    def of(cls, values: Tensor, sources: Sources | None = None) -> Interval:
        """The interval of a sample `[count]`, whose tasks come from some sources."""
        # Imported here: a run's first step need not wait for it. scipy.stats would take a second.
        from scipy.special import stdtrit

        count = len(values)
        values = values.double()
        if count < 2:
            return cls(float(values.mean()), float("nan"), count)
        quantile = float(stdtrit(count - 1, 0.975))
        over_sources = None if sources is None else half_width_over_sources(values, sources)
        return cls(float(values.mean()), quantile * float(values.std()) / count**0.5, count, over_sources)

    def __str__(self) -> str:
        return shown_interval(self.mean, self.half_width)


def half_width_over_sources(values: Tensor, sources: Sources) -> float | None:
    """Half the 95 % interval of the mean of values `[tasks]`, where tasks with a common source are correlated.

    The variance of the mean is `sum of e_i e_j over pairs of tasks with a common source / tasks^2 / (1 - s)`: e are the
    deviations from the mean, and s is the share of such pairs. With one source per task this is the cluster-robust
    variance, which a bootstrap over sources estimates too; with several it is the dyadic-robust one. It is never below
    the variance of independent tasks. The quantile is Student's; its degrees of freedom are one less than the effective
    number of sources, which is smaller than their number where a few of them have most of the tasks.

    Returns None where there are too few sources to tell.

    Reference: Liang, Zeger, Longitudinal data analysis using generalized linear models, 1986, Biometrika 73, section 3;
        Aronow, Samii, Assenova, Cluster-robust variance estimation for dyadic data, 2015, Political Analysis 23.
        Effective number: Carter, Schnepel, Steigerwald, Asymptotic behavior of a t-test robust to cluster
        heterogeneity, 2017, Review of Economics and Statistics 99, with equal correlation in all sources.

    >>> tasks = [("French",), ("French",), ("Finnish",), ("Finnish",), ("Malay",), ("Malay",)]
    >>> round(half_width_over_sources(torch.tensor([1.0, 1.0, 2.0, 2.0, 4.0, 4.0]), tasks), 3)
    3.795
    """
    from scipy.special import stdtrit  # here, as above

    member = membership(sources)
    shares = (member @ member.T > 0).double()
    shared, effective = float(shares.mean()), float(member.sum() ** 2 / member.sum(0).square().sum())
    if effective < 2 or shared > MOST_SHARED:
        return None
    count, deviations = len(values), values.double() - values.double().mean()
    clustered = float(deviations @ shares @ deviations) / (1 - shared)
    alone = float(deviations @ deviations) * count / (count - 1)
    return float(stdtrit(effective - 1, 0.975)) * max(clustered, alone) ** 0.5 / count


def membership(sources: Sources) -> Tensor:
    """Which task has which source: 1 or 0, `[tasks, sources]`, float64."""
    names = {name: column for column, name in enumerate(sorted({name for task in sources for name in task}))}
    member = torch.zeros(len(sources), len(names), dtype=torch.float64)
    for row, task in enumerate(sources):
        member[row, [names[name] for name in task]] = 1
    return member
