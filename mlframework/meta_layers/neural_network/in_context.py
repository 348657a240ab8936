"""Learning in context: the network reads the support set, then the queries, and no parameter changes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.recall import is_recalling, readers, recalled, recalling, split
from mlframework.episode import Episode, Examples, masked_mean
from mlframework.errors import InvalidValue
from mlframework.meta_layers.feature_meta_layer import require_features
from mlframework.meta_layers.meta_layer import Adapted, BatchNormPolicy, MetaLayer, Metrics
from mlframework.meta_layers.neural_network.densities import Density
from mlframework.meta_layers.neural_network.row_transformer import Context, RowTransformer
from mlframework.meta_layers.predictive import Predictive
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["InContext", "Prompt"]


class Prompt(NamedTuple):
    x: Tensor  # tokens of the support set, row after row, [tasks, positions]
    mask: Tensor  # [tasks, positions], 1 where a token counts


class InContext(MetaLayer):
    """Adapts by reading. Meta-trained on synthetic tasks, it is a prior-fitted network.

    **Sequences.** The base layer, a causal sequence model, is the meta layer too: its memory of the prompt is the
    task's model. `adapt` lines the support set up, `predict` lets the base layer read it and go on with the queries:
    once for all of them if the network `Recalls`, else once for each.

    **Other tasks.** A transformer takes the base layer's features: a token for each example, without positions. Support
    tokens carry the target and attend to each other; query tokens carry the features alone and attend to the support
    set. Hence any order and any size of the support set will do, and no query sees another. The task's model is the
    keys and values of the support set.

    With a `density` the network predicts a distribution of a regression's target, and minimises `query_nll`, minus its
    log-likelihood; the prediction is the mean, and `query_loss` its squared error.

    Args:
        base_layer: for sequences, it must take longer ones than the task's, and leave out what a mask leaves out;
            otherwise only its `features` are kept.
        width, depth, heads: of the transformer over examples; a sequence's base layer has its own.
        density: of a regression's target; None: the network predicts the target itself, by the task's loss.
        task, frozen, batch_norm: see `MetaLayer`.

    Reference: sequences: Brown et al., Language Models are Few-Shot Learners, 2020, arXiv:2005.14165, section 2;
        meta-trained as in Min et al., MetaICL, 2022, arXiv:2110.15943, section 3. Other tasks: Mueller et al.,
        Transformers Can Do Bayesian Inference, 2022, arXiv:2112.10510, sections 3 and 4; see `RowTransformer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        task: TaskDistribution,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        density: Density | None = None,
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "support",
    ) -> None:
        sequence = task.spec.kind == "sequence"
        if not sequence:
            base_layer = features_of(base_layer, type(self).__name__)
        super().__init__(base_layer, task, frozen=frozen, batch_norm=batch_norm)
        self.support_order_matters = sequence
        self.density = checked(density, task)
        if density is not None:
            self.minimised = "query_nll"
        self.rows = None if sequence else self.transformer(width=width, depth=depth, heads=heads)

    def transformer(self, **sizes: int) -> RowTransformer:
        """A transformer that takes the base layer's features and the task's targets."""
        spec = self.task.spec
        device = next(self.base_layer.parameters(), torch.empty(0)).device
        with torch.no_grad():
            features = self.base_layer(spec.zeros(2, device)).shape[-1]
        outputs = spec.out_features if self.density is None else self.density.outputs(spec.out_features)
        return RowTransformer(features, spec.out_features, outputs, **sizes)

    def adapt(self, support: Examples) -> Prompt | Context:
        if self.rows is None:
            return Prompt(support.x.flatten(1), support.mask.flatten(1))
        mask = self.mask_or_none(support.mask)
        features = self.in_parts(partial(self.call_base_layer, {}), support.x, mask)
        return self.rows.read(features, self.targets(support), mask)

    def predict(self, adapted: Prompt | Context, x: Tensor, mask: Tensor | None = None) -> Tensor:
        answers = self.answers(adapted, x, mask)
        return answers if self.density is None else self.density.mean(answers)

    def answers(self, adapted: Prompt | Context, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the network puts out: predictions, or with a density its parameters, `[tasks, n, outputs]`."""
        if isinstance(adapted, Prompt):
            return self.after_prompt(adapted, x, mask)
        assert self.rows is not None
        return self.rows.answer(adapted, self.call_base_layer({}, x, mask))

    def predict_distribution(self, adapted: Prompt | Context, x: Tensor, mask: Tensor | None = None) -> Predictive:
        return self.distribution(self.answers(adapted, x, mask))

    def distribution(self, answers: Tensor) -> Predictive:
        """The mean and the variance of the density with the parameters `answers`; without one, the predictions."""
        if self.density is None:
            return Predictive(answers)
        return Predictive(self.density.mean(answers), self.density.variance(answers))

    def query_metrics(self, adapted: Adapted, episode: Episode, batch_norm: BatchNormPolicy | None = None) -> Metrics:
        """The query metrics, each `[tasks]`; with a density `query_nll` is its own likelihood, not a normal one's."""
        if self.density is None:
            return super().query_metrics(adapted, episode, batch_norm)
        query = episode.query

        def read(x: Tensor, mask: Tensor | None) -> Predictive:
            return Predictive(self.answers(adapted, x, mask))

        answers = self.by_policy(read, episode, batch_norm or self.batch_norm).prediction
        nll = masked_mean(self.density.nll(answers, query.y), self.mask_or_none(query.mask))
        return {**self.metrics_of(adapted, self.distribution(answers), query), "query_nll": nll}

    def after_prompt(self, adapted: Prompt, x: Tensor, mask: Tensor | None) -> Tensor:
        """Predictions for sequences `[tasks, n, length]`, each read after the prompt."""
        if recalled(self.base_layer):  # it has read the prompt
            return self.call_base_layer({}, x, mask)
        if readers(self.base_layer) and not self.base_layer.mixes_examples:
            return self.read_on(adapted, x, mask)
        prompt, counted = (leaf.unsqueeze(1).expand(-1, x.shape[1], -1) for leaf in adapted)
        sequence = torch.cat([prompt, x], dim=-1)
        if self.task.spec.ragged:
            after = torch.ones_like(x, dtype=counted.dtype) if mask is None else mask
            mask = torch.cat([counted, after], dim=-1)
        return self.call_base_layer({}, sequence, mask)[..., prompt.shape[-1] :, :]

    def read_on(self, adapted: Prompt, x: Tensor, mask: Tensor | None) -> Tensor:
        """Reads each prompt once, then all that follows it: one batch, for the network is the same for all tasks."""
        with nullcontext() if is_recalling(self.base_layer) else recalling(self.base_layer):
            self.base_layer(adapted.x, self.mask_or_none(adapted.mask))
            split(self.base_layer, x.shape[1])
            prediction = self.base_layer(x.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
        return prediction.unflatten(0, x.shape[:2])


def features_of(base_layer: nn.Module, algorithm: str) -> BaseLayer:
    """A base layer without its head."""
    require_features(base_layer, algorithm)
    assert isinstance(base_layer, BaseLayer)
    return BaseLayer(base_layer.features, nn.Identity())


def checked(density: Density | None, task: TaskDistribution) -> Density | None:
    """Refuses a density of classes."""
    if density is not None and task.spec.kind != "regression":
        why = f"is for a regression, and {type(task).__name__} is a {task.spec.kind}: leave it at null"
        raise InvalidValue("density", type(density).__name__, why)
    return density
