"""How well predictive distributions say what they do not know: definitions, each with a value per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlframework.episode import Episode, Kind, masked_mean
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.meta_layers.predictive import Predictive, normal_nll

__all__ = [
    *("Answers", "Bins", "LEVELS", "accuracy", "answer", "auroc", "binned", "brier", "calibration_error", "coverage"),
    *("interval_error", "mse", "nll", "predicted_queries", "surprise"),
]

#: Nominal probabilities of the central intervals whose coverage is counted.
LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


class Answers(NamedTuple):
    """The predictive distributions of all queries of some tasks, and the targets; positions of sequences are queries.

    All on the CPU; numbers are float64.
    """

    kind: Kind
    found: Predictive  # [tasks, n, out_features]; a regression's has a variance
    y: Tensor  # class ids [tasks, n], or values [tasks, n, out_features]
    mask: Tensor  # 1 where a query counts, [tasks, n]

    def changed(self, change: Callable[[Predictive], Predictive]) -> Answers:
        """The same queries with other distributions."""
        return self._replace(found=change(self.found))

    @property
    def confidence(self) -> Tensor:
        """The probability of the likeliest class, `[tasks, n]`."""
        return self.found.prediction.softmax(-1).amax(-1)

    @property
    def right(self) -> Tensor:
        """1 where the likeliest class is the true one, `[tasks, n]`."""
        return (self.found.prediction.argmax(-1) == self.y).double()


def predicted_queries(meta_layer: MetaLayer, tasks: Iterable[Episode], steps: int) -> Answers:
    """The answers of an algorithm to all queries after some inner steps, under its own batch-norm policy."""
    meta_layer.eval()
    device = next(meta_layer.parameters(), torch.empty(0)).device
    parts = []
    for episode in tasks:
        asked = episode.to(device)
        with torch.no_grad():
            adapted = last(meta_layer.trajectory(asked.support, steps))
            found = meta_layer.query_distribution(adapted, asked, meta_layer.batch_norm)
        parts.append(answer(meta_layer.task.spec.kind, found, episode))
    found = Predictive.joined([part.found for part in parts], dim=0)
    return Answers(parts[0].kind, found, torch.cat([p.y for p in parts]), torch.cat([p.mask for p in parts]))


def answer(kind: Kind, found: Predictive, episode: Episode) -> Answers:
    """The answers to one episode's queries; the positions of a sequence are queries."""
    y, mask = episode.query.y, episode.query.mask
    leaves = [None if leaf is None else leaf.flatten(1, -2).double().cpu() for leaf in found]
    y = y.double() if kind == "regression" else y.flatten(1)
    assert leaves[0] is not None
    return Answers(kind, Predictive(leaves[0], leaves[1]), y, (mask.flatten(1) > 0).double())


def nll(answers: Answers) -> Tensor:
    """Minus the log probability of the target, or its density, in nats: the mean over queries, `[tasks]`."""
    return masked_mean(surprise(answers), answers.mask)


def surprise(answers: Answers) -> Tensor:
    """Minus the log probability of each target, or its density, `[tasks, n]`; outputs are averaged."""
    prediction, variance = answers.found
    if answers.kind == "regression":
        assert variance is not None
        return normal_nll(prediction, variance, answers.y)
    return F.cross_entropy(prediction.flatten(0, 1), answers.y.flatten(), reduction="none").view(answers.y.shape)


def brier(answers: Answers) -> Tensor:
    """`sum over classes of (probability - 1 for the true class, else 0)^2`: the mean over queries, `[tasks]`.

    Reference: Brier, Verification of forecasts expressed in terms of probability, 1950; 0 is best, 2 is worst.
    """
    probabilities = answers.found.prediction.softmax(-1)
    truth = F.one_hot(answers.y, probabilities.shape[-1]).double()
    return masked_mean((probabilities - truth).square().sum(-1), answers.mask)


def mse(answers: Answers) -> Tensor:
    """The squared error, averaged over outputs and queries, `[tasks]`."""
    return masked_mean((answers.y - answers.found.prediction).square().mean(-1), answers.mask)


def accuracy(answers: Answers) -> Tensor:
    """The share of queries whose likeliest class is the true one, `[tasks]`."""
    return masked_mean(answers.right, answers.mask)


class Bins(NamedTuple):
    """Queries, pooled over all tasks, by their confidence; each leaf is `[bins]`, 0 in an empty bin."""

    edges: Tensor  # the upper end of each bin, which belongs to it
    queries: Tensor  # how many
    confidence: Tensor  # mean
    accuracy: Tensor


def binned(answers: Answers, bins: int, *, adaptive: bool = False) -> Bins:
    """Bins of equal width between 0 and 1, or, if `adaptive`, of equally many queries."""
    confidence, edges = answers.confidence, edges_of(answers, bins, adaptive=adaptive)
    member = F.one_hot(torch.bucketize(confidence, edges[:-1]), bins) * answers.mask.unsqueeze(-1)
    queries = member.sum((0, 1))
    means = [(member * each.unsqueeze(-1)).sum((0, 1)) / queries.clamp(min=1) for each in (confidence, answers.right)]
    return Bins(edges, queries, means[0], means[1])


def edges_of(answers: Answers, bins: int, *, adaptive: bool) -> Tensor:
    """The upper end of each bin `[bins]`; the last is 1."""
    if not adaptive:
        return torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:]
    ordered = answers.confidence[answers.mask > 0].sort().values
    ends = (torch.arange(1, bins) * len(ordered)) // bins - 1
    return torch.cat([ordered[ends.clamp(min=0)], torch.ones(1, dtype=torch.float64)])


def calibration_error(answers: Answers, bins: int, *, adaptive: bool = False) -> Tensor:
    """The expected calibration error (ECE), as each task's share in it `[tasks]`: their mean is the ECE.

    `ECE = sum over bins of |accuracy - confidence| * (queries in the bin / all queries)`, over the queries of all
    tasks, by the confidence in the likeliest class. A task's share is the sum of `right - confidence` over its queries,
    with the sign of its bin's sum, divided by the mean number of queries of a task. An interval of these shares takes
    the signs for given: where the true gap of a bin is near 0, the ECE is too large by chance, and the interval does
    not show it.

    Reference: Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599, equation 3; bins of equally
        many: Nixon et al., Measuring Calibration in Deep Learning, 2019, arXiv:1904.01685, for the likeliest class.
    """
    found = binned(answers, bins, adaptive=adaptive)
    sign = torch.where(found.accuracy >= found.confidence, 1.0, -1.0).double()
    signs = sign[torch.bucketize(answers.confidence, found.edges[:-1])]
    shares = ((answers.right - answers.confidence) * signs * answers.mask).sum(1)
    return shares / answers.mask.sum(1).mean()


def coverage(answers: Answers, levels: Tensor = LEVELS) -> Tensor:
    """The share of a task's values that lie in the central interval of each nominal probability, `[tasks, levels]`."""
    prediction, variance = answers.found
    assert variance is not None
    inside = torch.special.erf((answers.y - prediction).abs() / (2 * variance).sqrt())  # the interval that just has it
    covered = (inside.unsqueeze(-1) <= levels).double().mean(2)  # over outputs: [tasks, n, levels]
    return (covered * answers.mask.unsqueeze(-1)).sum(1) / answers.mask.sum(1, keepdim=True)


def interval_error(answers: Answers, levels: Tensor = LEVELS) -> Tensor:
    """The calibration error of a regression, as each task's share in it `[tasks]`: their mean is the error.

    It is the mean over nominal probabilities of `|coverage - nominal|`, with the coverage over all tasks. A task's
    share has the sign of the whole gap; see `calibration_error`.

    Reference: Kuleshov, Fenner, Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, 2018,
        arXiv:1807.00263, section 3.5; central intervals for quantiles, absolute for squared differences.
    """
    gaps = coverage(answers, levels) - levels
    return (gaps * torch.where(gaps.mean(0) >= 0, 1.0, -1.0)).mean(1)


def auroc(own: Tensor, other: Tensor, own_counts: Tensor, other_counts: Tensor) -> Tensor:
    """The probability `[tasks]` that a query from elsewhere scores above one of the task's own; ties count half.

    Scores and masks are `[tasks, n]` and `[tasks, m]`. 0.5 is chance, 1 is best.
    """
    gaps = other.unsqueeze(1) - own.unsqueeze(2)
    pairs = own_counts.unsqueeze(2) * other_counts.unsqueeze(1)
    wins = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return (wins * pairs).sum((1, 2)) / pairs.sum((1, 2))
