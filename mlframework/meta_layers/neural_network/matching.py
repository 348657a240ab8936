"""Matching networks: a query takes the labels of the support examples that it resembles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.episode import Examples
from mlframework.inner_loop.inner_update import at_least, positive
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.neural_network.networks import attention, cosines
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FullContext", "Matching", "Memory"]

#: Added to probabilities: the logarithm stays finite for a class that the query does not resemble.
FLOOR = 1e-6


class Memory(NamedTuple):
    keys: Tensor  # embeddings [tasks, n, d]
    values: Tensor  # one-hot classes, or numbers, [tasks, n, out_features]
    mask: Tensor  # [tasks, n], 1 where an example counts


class Matching(FeatureMetaLayer):
    """Predicts by cosine attention over the support set: a mean of its labels, weighted by likeness.

    The base layer is the embedding network; the meta layer is the attention and, with `full_context`, the two recurrent
    networks that embed every example in sight of the support set. A task's model is a memory of embeddings and labels.

    In a classification predictions are logarithms of the class probabilities; in a regression, which is beyond the
    paper, the weighted mean of the values itself. In a sequence the support set is a cache of states with the tokens
    that followed them (Grave et al. 2017; Khandelwal et al. 2020): the probabilities that attention reads from it are
    mixed with the prior's, in a proportion that a learned gate takes from the feature. Deviations: the cosines have a
    learned scale, without which no class of a 5-way task can have more than 65 % (the paper's is 1); support and query
    share the embedding network.

    Args:
        scale: of the cosines, where its learning starts.
        full_context: whether examples are embedded in sight of the support set. The result then depends on the order of
            the support set, which a bidirectional LSTM reads row by row.
        reads: reads of the attention LSTM over each query, the paper's K; only with `full_context`.

    Reference: Vinyals et al., Matching Networks for One Shot Learning, 2016, arXiv:1606.04080, equation 1, section
        2.1.2 and appendix A. Caches: Grave, Joulin, Usunier 2017, arXiv:1612.04426, section 3; Khandelwal et al.
        2020, arXiv:1911.00172, equation 3. Deviation from these: the cache is learned with, cosines and gate included.
    """

    any_n_way = True

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        scale: float = 10.0,
        full_context: bool = False,
        reads: int = 5,
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, **settings)
        self.scale = nn.Parameter(torch.tensor(float(positive("scale", scale))))
        self.gate = nn.Linear(self.feature_size, 1) if task.spec.kind == "sequence" else None
        reads = at_least("reads", reads, 1)
        self.context = FullContext(self.feature_size, reads) if full_context else None
        self.support_order_matters = full_context

    def fit(self, features: Tensor, support: Examples) -> Memory:
        keys = features if self.context is None else self.context.embed_support(features, support.mask)
        return Memory(keys, self.targets(support), support.mask)

    def outputs(self, adapted: Memory, features: Tensor) -> Tensor:
        queries = features if self.context is None else self.context.embed_queries(features, adapted)
        mean = attention(self.scale * cosines(queries, adapted.keys), adapted.mask) @ adapted.values
        if self.prior is not None and self.gate is not None:
            gate, prior = self.gate(features), self.prior(features).log_softmax(-1)
            return torch.logaddexp(F.logsigmoid(-gate) + prior, F.logsigmoid(gate) + (mean + FLOOR).log())
        return mean if self.task.spec.kind == "regression" else (mean + FLOOR).log()


class FullContext(nn.Module):
    """Full context embeddings: examples are embedded in sight of the whole support set.

    The LSTMs are steps in a loop, so that a row which does not count is passed over wherever it stands. What is
    the same in every step is multiplied by its weights once, before the loop.

    Reference: Vinyals et al. 2016, arXiv:1606.04080, appendix A.1 (queries) and A.2 (support).
    """

    def __init__(self, d: int, reads: int) -> None:
        super().__init__()
        self.forwards, self.backwards = nn.LSTMCell(d, d), nn.LSTMCell(d, d)
        self.reader = nn.LSTMCell(2 * d, d)
        self.reads = reads

    def embed_support(self, features: Tensor, mask: Tensor) -> Tensor:
        """`g` of every support example `[tasks, n, d]`: its feature and the states of two LSTMs that come by."""
        onwards = states(self.forwards, features, mask)
        back = states(self.backwards, features.flip(1), mask.flip(1)).flip(1)
        return features + onwards + back

    def embed_queries(self, features: Tensor, memory: Memory) -> Tensor:
        """`f` of every query `[tasks, n, d]`, by an LSTM that reads the support set by content attention."""
        reader = self.reader
        to_features, to_keys = reader.weight_ih.split(features.shape[-1], dim=1)
        of_features = F.linear(features, to_features, reader.bias_ih + reader.bias_hh)
        of_keys = F.linear(memory.keys, to_keys)  # a mean of these is what a mean of keys gives
        hidden, cell = torch.zeros_like(features), torch.zeros_like(features)
        for number in range(self.reads):
            gates = of_features + attention(hidden @ memory.keys.mT, memory.mask) @ of_keys
            if number > 0:  # at first the state is zero
                gates = gates + F.linear(hidden, reader.weight_hh)
            moved, cell = opened(gates, cell)
            hidden = moved + features
        return hidden


def states(lstm: nn.LSTMCell, inputs: Tensor, mask: Tensor) -> Tensor:
    """The state `[tasks, n, d]` of an LSTM after each of the inputs `[tasks, n, d]`; masked rows leave it unchanged."""
    of_inputs = F.linear(inputs, lstm.weight_ih, lstm.bias_ih + lstm.bias_hh)
    hidden, cell = torch.zeros_like(inputs[:, 0]), torch.zeros_like(inputs[:, 0])
    found: list[Tensor] = []
    for row, counts in zip(of_inputs.unbind(1), mask.bool().unsqueeze(-1).unbind(1), strict=True):
        gates = row + F.linear(hidden, lstm.weight_hh) if found else row  # at first the state is zero
        moved = opened(gates, cell)
        hidden, cell = torch.where(counts, moved[0], hidden), torch.where(counts, moved[1], cell)
        found.append(hidden)
    return torch.stack(found, dim=1)


def opened(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """An LSTM's next state and cell, from its four gates `[..., 4 d]` in torch's order and its cell `[..., d]`."""
    enter, keep, new, out = gates.chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell
