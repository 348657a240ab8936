"""Laplace's approximation for the last layer: how far the support set leaves each task's head open."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.evaluation.calibration import Answers, answer, nll
from mlframework.evaluation.predictors.predictor import DerivedPredictor, FittedPredictor, Wrapped
from mlframework.evaluation.task_set import TaskSet
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import Adapted, MetaLayer
from mlframework.meta_layers.predictive import Predictive
from mlframework.solvers.gaussian_process import condition, posterior

__all__ = ["LaplaceHead", "LaplaceLayer", "Support", "variance_of_logits", "variance_of_values"]


class Support(NamedTuple):
    """What each task's head has seen."""

    features: Tensor  # with a last feature of 1 for the bias, 0 in rows of padding, [tasks, n, d], float64
    probabilities: Tensor  # of the classes, [tasks, n, classes], float64; a regression's are not read
    counts: Tensor  # 1 for rows that count, else 0, [tasks, n], float64


class LaplaceHead(DerivedPredictor):
    """Takes the weights of each task's linear head for normal: precise where the support set has determined them.

    The precision matrix is the Gauss-Newton matrix of the support loss by the head's weights and biases, and the
    prior's `precision` on its diagonal. It is exact: no part of the matrix is left out. The features are those of the
    task's adapted network. The algorithm's own prediction is the mean, so that any algorithm with features will do; the
    variance is right if its head is linear in them.

    A regression's variance is `noise * (1 + x' (X'X + noise * precision I)^-1 x)`; `noise * precision` is chosen, and
    for each the noise follows. A class's logit is divided by `sqrt(1 + pi / 8 variance)` (MacKay 1992).

    Args:
        precisions: of the prior, among which validation tasks choose by the probability of their queries' targets; in a
            regression, times the noise.

    Reference: Daxberger et al., Laplace Redux, 2021, arXiv:2106.14806, sections 2 and 3; MacKay, The evidence framework
        applied to classification networks, 1992.
    """

    kinds = ("regression", "classification")

    def __init__(self, *, precisions: Sequence[float]) -> None:
        if not precisions or not all(each > 0 for each in precisions):
            raise InvalidValue("precisions", list(precisions), "must hold numbers above 0")
        self.precisions = list(precisions)

    def fitted(self, meta_layer: MetaLayer, validation: TaskSet, steps: int) -> FittedPredictor:
        layer = LaplaceLayer(meta_layer, self.precisions[0])
        seen = [layer.gathered(episode, steps) for episode in validation]
        settings = [setting_of(seen, precision) for precision in self.precisions]
        best = min(settings, key=lambda setting: setting.cost)
        made = LaplaceLayer(meta_layer, best.precision, best.noise)
        return FittedPredictor(made, f"precision {best.precision / best.noise:.3g}")


class Seen(NamedTuple):
    """Some validation tasks: their heads' support sets, and their queries with the algorithm's own answers."""

    support: Support
    features: Tensor  # of the queries, [tasks, n, d]
    answers: Answers


class Setting(NamedTuple):
    """A setting of the prior, with the mean negative log probability of the validation queries' targets."""

    cost: float
    precision: float
    noise: float


def setting_of(seen: Sequence[Seen], precision: float) -> Setting:
    """The cost of a precision, with the noise that makes it lowest in a regression, in closed form."""
    if seen[0].answers.kind == "classification":
        found = [Predictive(moderated(a.found.prediction, variance_of_logits(s, x, precision))) for s, x, a in seen]
        return Setting(mean_nll(seen, found), precision, 1.0)
    spreads = [variance_of_values(s, x, precision).unsqueeze(-1) for s, x, _ in seen]
    scores = [squares(a) / spread for (_, _, a), spread in zip(seen, spreads, strict=True)]
    counted = [score[a.mask > 0] for (_, _, a), score in zip(seen, scores, strict=True)]
    noise = float(torch.cat(counted).mean().clamp(min=torch.finfo(torch.float32).tiny))
    variances = [(noise * spread).expand_as(a.y) for (_, _, a), spread in zip(seen, spreads, strict=True)]
    found = [Predictive(a.found.prediction, v) for (_, _, a), v in zip(seen, variances, strict=True)]
    return Setting(mean_nll(seen, found), precision, noise)


def squares(answers: Answers) -> Tensor:
    """The squared error of every value, `[tasks, n, out_features]`."""
    return (answers.y - answers.found.prediction).square()


def mean_nll(seen: Sequence[Seen], found: Sequence[Predictive]) -> float:
    """The mean over tasks, with other answers in place of the algorithm's own."""
    return float(torch.cat([nll(s.answers._replace(found=f)) for s, f in zip(seen, found, strict=True)]).mean())


class LaplaceLayer(Wrapped):
    """An algorithm whose tasks' heads are uncertain; see `LaplaceHead`.

    Args:
        precision: of the prior; in a regression, times the noise.
        noise: variance of a regression's noise.
    """

    def __init__(self, inner: MetaLayer, precision: float, noise: float = 1.0) -> None:
        super().__init__(inner)
        self.precision, self.noise = precision, noise
        self.by_class = inner.task.spec.kind == "classification"

    def adapt(self, support: Examples) -> Adapted:
        return self.seen(self.inner.adapt(support), support)

    def trajectory(self, support: Examples, steps: int) -> Iterator[Adapted]:
        return (self.seen(adapted, support) for adapted in self.inner.trajectory(support, steps))

    def seen(self, adapted: Adapted, support: Examples) -> tuple[Adapted, Support]:
        """The task's model, and what its head has seen of the support set."""
        mask = self.mask_or_none(support.mask)
        counts = (support.mask > 0).double()
        features = with_bias(self.inner.adapted_features(adapted, support.x, mask)) * counts.unsqueeze(-1)
        logits = self.inner.predict(adapted, support.x, mask).double()
        return adapted, Support(features, logits.softmax(-1), counts)

    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive:
        model, support = adapted
        prediction = self.inner.predict(model, x, mask)
        features = with_bias(self.inner.adapted_features(model, x, mask))
        if self.by_class:
            variance = variance_of_logits(support, features, self.precision)
            return Predictive(moderated(prediction.double(), variance).to(prediction.dtype))
        spread = variance_of_values(support, features, self.precision).unsqueeze(-1)
        return Predictive(prediction, (self.noise * spread).expand_as(prediction).to(prediction.dtype))

    def gathered(self, episode: Episode, steps: int) -> Seen:
        self.eval()
        asked = episode.to(next(self.parameters()).device)
        with torch.no_grad():
            model, support = last(self.trajectory(asked.support, steps))
            found = self.inner.query_distribution(model, asked, self.batch_norm)
            features = self.by_policy(functools.partial(self.features, model), asked, self.batch_norm).prediction
        answers = answer(self.task.spec.kind, found, episode)
        return Seen(Support(*(leaf.cpu() for leaf in support)), with_bias(features).cpu(), answers)

    def features(self, model: Adapted, x: Tensor, mask: Tensor | None) -> Predictive:
        return Predictive(self.inner.adapted_features(model, x, mask))


def with_bias(features: Tensor) -> Tensor:
    """Features `[tasks, n, d]` in float64 and a last one of 1."""
    features = features.double()
    return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)


def variance_of_values(support: Support, features: Tensor, precision: float) -> Tensor:
    """`1 + x' (X'X + precision I)^-1 x` of every query `x`: the variance `[tasks, n]` in units of the noise.

    It is that of a Gaussian process with the kernel `x'y / precision` and noise 1. Features are `[tasks, n, d]`.
    """
    seen = condition(support.features @ support.features.mT / precision, support.features[..., :1], noise=1.0)
    cross = features @ support.features.mT / precision
    return 1 + posterior(seen, cross, features.square().sum(-1) / precision)[1]


def variance_of_logits(support: Support, features: Tensor, precision: float) -> Tensor:
    """The variance of each class's logit `[tasks, m, classes]` at query features `[tasks, m, d]`.

    The Gauss-Newton matrix by the weights is the sum over examples of `x_i x_i'` times `diag(p_i) - p_i p_i'`, which is
    `S_i' S_i` with `S_i = diag(sqrt(p_i)) (I - 1 p_i')`. By Woodbury's identity one factor of size `n * classes` is
    enough.
    """
    p, classes = support.probabilities, support.probabilities.shape[-1]
    identity = torch.eye(classes, dtype=p.dtype, device=p.device)
    roots = p.sqrt().unsqueeze(-1) * (identity - p.unsqueeze(-2)) * support.counts[..., None, None]  # [tasks, n, k, k]
    inner = support.features @ support.features.mT / precision
    cross = support.features @ features.mT / precision
    matrix = torch.einsum("tnac,tnm,tmbc->tnamb", roots, inner, roots).flatten(3, 4).flatten(1, 2)
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    reached = torch.einsum("tnac,tnm->tnamc", roots, cross).flatten(3, 4).flatten(1, 2)
    explained = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), reached, upper=False).square().sum(1)
    prior = features.square().sum(-1, keepdim=True) / precision
    return (prior - explained.unflatten(-1, (-1, classes))).clamp(min=0)


def moderated(logits: Tensor, variance: Tensor) -> Tensor:
    """Logits whose softmax is nearly the mean softmax of normal logits with this variance.

    A number that is added to all logits of a query changes nothing.
    """
    logits = logits - logits.mean(-1, keepdim=True)
    return logits / (1 + math.pi / 8 * variance).sqrt()
