"""Deep kernel transfer: a Gaussian process on learned features."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Episode, Examples
from mlframework.errors import InvalidValue
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import Metrics, with_settings_of
from mlframework.meta_layers.predictive import Predictive
from mlframework.meta_layers.svm.kernels import Kernel, Positive
from mlframework.solvers.gaussian_process import Conditioned, condition, log_marginal_likelihood, posterior
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["DeepKernel", "Process"]

ProcessLoss = Literal["marginal", "predictive"]


class Process(NamedTuple):
    """Each task's model: a Gaussian process that has seen the support set."""

    features: Tensor  # of the support set, 0 in rows that do not count, [tasks, n, d], float64
    counts: Tensor  # 1 for rows that count, 0 for others, [tasks, n], float64
    conditioned: Conditioned


class DeepKernel(FeatureMetaLayer):
    """Conditions a Gaussian process on the support features; the outer loop learns the features and the kernel.

    A task's function is `offset + f`, where `f` has the covariance `variance * kernel`, and every observation has
    normal noise of variance `least_noise + noise`. All outputs share the kernel. The posterior is exact, in float64.

    A regression states the mean and the variance of each query, its noise included.

    A classification is a regression on labels of -1 and 1 for each class against all others. The probability that a
    class's label is above 0 is `Phi(mean / sqrt(variance))`. Its logarithm is the logit of the class: the softmax
    divides each of these probabilities by their sum, so that a query far from all examples has equal ones.

    Args:
        base_layer, task, settings: see `FeatureMetaLayer`.
        kernel: similarity of features.
        loss: `marginal` is minus the log marginal likelihood of all examples of a task, support and query together, per
            example; the outputs of a regression are averaged, the classes are summed. `predictive` is minus the log
            probability of the queries, given the support set.
        variance: of the function, where its learning starts.
        noise: variance of the noise above `least_noise`, where its learning starts.
        least_noise: below which the noise cannot fall, as it would on data without noise.
        learn: which of `variance` and `noise` are learned.

    Reference: Patacchiola, Turner, Crowley, O'Boyle, Storkey, Bayesian Meta-Learning for the Few-Shot Setting via Deep
        Kernels, 2020, arXiv:1910.05199, algorithm 1. Deviations: the loss is divided by the number of examples; the
        normalised logits, where the paper takes the class with the largest mean; `predictive`.
    """

    kinds = ("regression", "classification")
    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        kernel: Kernel,
        loss: ProcessLoss = "marginal",
        variance: float = 1.0,
        noise: float = 0.1,
        least_noise: float = 1e-4,
        learn: Collection[str] = ("variance", "noise"),
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, **settings)
        if loss not in get_args(ProcessLoss):
            raise InvalidValue("loss", loss, f"must be one of {', '.join(get_args(ProcessLoss))}")
        if loss == "marginal" and self.base_layer.mixes_examples and self.batch_norm != "support":
            why = "a marginal likelihood needs one normalisation for a whole task: use support, or loss=predictive"
            raise InvalidValue("batch_norm", self.batch_norm, why)
        self.kernel, self.loss = kernel, loss
        self.positive = Positive({"variance": variance, "noise": noise}, learn=learn)
        self.least_noise = at_least("least_noise", least_noise, 0)
        self.by_class = task.spec.kind == "classification"
        # Classes are interchangeable, so that they share an offset.
        self.offset = nn.Parameter(torch.zeros(() if self.by_class else task.spec.out_features))
        self.minimised = "query_loss" if self.by_class else "query_nll"
        self.exact = loss == "predictive"

    @property
    def noise(self) -> Tensor:
        return self.positive["noise"].double() + self.least_noise

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        return self.positive["variance"].double() * self.kernel(a, b)

    def labels(self, examples: Examples) -> Tensor:
        """The observations `[tasks, n, out_features]` of a process with mean 0."""
        targets = self.targets(examples)
        return (2 * targets - 1 if self.by_class else targets) - self.offset

    def process(self, features: Tensor, examples: Examples) -> Process:
        """The process, conditioned on features `[tasks, n, d]` with their targets."""
        counts = (examples.mask > 0).double()
        features = features.double().masked_fill(counts.unsqueeze(-1) == 0, 0)
        kernel, mask = self.covariance(features, features), self.mask_or_none(examples.mask)
        return Process(features, counts, condition(kernel, self.labels(examples), noise=self.noise, mask=mask))

    def fit(self, features: Tensor, support: Examples) -> Process:
        return self.process(features, support)

    def moments(self, adapted: Process, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[tasks, n, out_features]` and variance `[tasks, n, 1]` of observations at features `[tasks, n, d]`."""
        features = features.double()
        cross = self.covariance(features, adapted.features) * adapted.counts.unsqueeze(1)
        prior = self.positive["variance"].double() * self.kernel.variance(features)
        mean, variance = posterior(adapted.conditioned, cross, prior)
        return mean + self.offset, (variance + self.noise).unsqueeze(-1)

    def outputs(self, adapted: Process, features: Tensor) -> Tensor:
        return self.distribution(adapted, features).prediction

    def distribution(self, adapted: Process, features: Tensor) -> Predictive:
        mean, variance = self.moments(adapted, features)
        if self.by_class:
            return Predictive(torch.special.log_ndtr(mean / variance.sqrt()).to(features.dtype))
        return Predictive(mean.to(features.dtype), variance.expand_as(mean).to(features.dtype))

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Metrics]:
        if self.loss == "predictive":
            return super().meta_loss(episode)
        (of_support, of_query), both = self.features_of_both(episode), episode.joined()
        adapted = self.fit(of_support, episode.support)
        metrics = self.metrics_of(adapted, self.distribution(adapted, of_query), episode.query)
        return self.marginal_loss(torch.cat([of_support, of_query], dim=1), both).to(of_query.dtype), metrics

    def marginal_loss(self, features: Tensor, examples: Examples) -> Tensor:
        """Minus the log marginal likelihood per example `[tasks]` of features `[tasks, n, d]` with their targets."""
        conditioned = self.process(features, examples).conditioned
        found = log_marginal_likelihood(conditioned, self.labels(examples), self.mask_or_none(examples.mask))
        return -(found.sum(-1) if self.by_class else found.mean(-1)) / (examples.mask > 0).sum(1)

    def diagnostics(self, adapted: Process) -> Metrics:
        like = adapted.conditioned.jitter
        learned = {**self.positive.learned(), **self.kernel.learned()}
        return {"jitter": like} | {name: value.expand(len(like)) for name, value in learned.items()}
