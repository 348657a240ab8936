"""Meta Networks: slow weights for all tasks, and fast weights that a meta learner makes of loss gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer
from mlframework.base_layers.mlp import check_hidden
from mlframework.episode import Examples
from mlframework.inner_loop.inner_loop import differentiable
from mlframework.inner_loop.inner_update import at_least
from mlframework.meta_layers.feature_meta_layer import FeatureMetaLayer
from mlframework.meta_layers.meta_layer import with_settings_of
from mlframework.meta_layers.neural_network.networks import attention, cosines, fully_connected, set_mean
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["FastWeights", "MakesFastWeights", "MetaNetworks"]


class FastWeights(NamedTuple):
    representation: Tensor  # fast weights of the representation learner (the paper's Q*), [tasks, size, d + 1]
    memory: Tensor  # of the base learner, one per support example (M), [tasks, n, out_features, d + 1]
    keys: Tensor  # the representations by which the memory is read (R), [tasks, n, size]
    mask: Tensor  # [tasks, n], 1 where a support example counts


class MetaNetworks(FeatureMetaLayer):
    """Slow weights are learned by the outer loop; fast weights are made of the support examples' loss gradients.

    The base layer is the features with the base learner `b`, a linear head; the meta layer is the representation
    learner `u` and the two networks `d` and `m` that turn gradients into fast weights. `fit` makes the representation's
    fast weights from gradients of its loss. Each example's gradient of the base learner's loss makes fast weights that
    go into a memory, beside the example's representation. `outputs` represents a query, reads the memory by cosine
    attention, and predicts with slow and fast weights. These are put together by layer augmentation: each gives its own
    activation, and the activations are added.

    Deviations: `b` and `u` share the base layer's features, and only what stands above those has fast weights, one
    layer of each (in the paper they are two whole networks); `d` averages over the gradients, where the paper's is an
    LSTM that reads them in some order; gradients are differentiated through; a fast weight is a learned multiple of its
    gradient and a network's correction of that, which starts as zero; activations and the preprocessing of gradients
    are smooth. The paper has no regression.

    Args:
        size: of the representation.
        hidden: width of each hidden layer of `d` and `m`, the same network for every weight.
        rate: minus the multiple of a gradient that its fast weight starts as.

    Reference: Munkhdalai, Yu, Meta Networks, 2017, arXiv:1703.00837, section 3 and algorithm 1. Preprocessing of
        gradients: Andrychowicz et al. 2016, arXiv:1606.04474, appendix A.
    """

    kinds = ("classification", "regression")

    @with_settings_of(FeatureMetaLayer)
    def __init__(
        self,
        base_layer: BaseLayer,
        task: TaskDistribution,
        *,
        size: int = 16,
        hidden: Sequence[int] = (20, 20),
        rate: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__(base_layer, task, **settings)
        check_hidden(hidden)
        at_least("size", size, 1)
        inputs, out = self.feature_size + 1, task.spec.out_features
        self.learner = nn.Linear(inputs, out, bias=False)
        self.representation = nn.Linear(inputs, size, bias=False)
        self.representation_head = nn.Linear(size, out)
        self.to_learner, self.to_representation = MakesFastWeights(hidden, rate), MakesFastWeights(hidden, rate)

    def fit(self, features: Tensor, support: Examples) -> FastWeights:
        inputs = with_one(features)

        def representation_losses(weights: Tensor) -> Tensor:
            represented = F.silu(apply_each(weights, inputs))
            return self.task.loss(self.representation_head(represented), support.y)

        def learner_losses(weights: Tensor) -> Tensor:
            return self.task.loss(apply_each(weights, inputs), support.y)

        shape = support.mask.shape
        found = self.to_representation(gradients(representation_losses, self.representation.weight, shape))
        fast = set_mean(found.flatten(2), support.mask).unflatten(-1, found.shape[2:])
        memory = self.to_learner(gradients(learner_losses, self.learner.weight, shape))
        return FastWeights(fast, memory, self.represent(inputs, fast), support.mask)

    def outputs(self, adapted: FastWeights, features: Tensor) -> Tensor:
        inputs = with_one(features)
        read = attention(cosines(self.represent(inputs, adapted.representation), adapted.keys), adapted.mask)
        # The output is linear in the fast weights: reading their answers is reading the weights, and is smaller.
        answers = torch.einsum("tmod,tnd->tnmo", adapted.memory, inputs)
        return self.learner(inputs) + (read.unsqueeze(-1) * answers).sum(2)

    def represent(self, inputs: Tensor, fast: Tensor) -> Tensor:
        """Representations `[tasks, n, size]` of inputs `[tasks, n, d + 1]` by slow and by fast weights."""
        return F.silu(self.representation(inputs)) + F.silu(inputs @ fast.mT)


class MakesFastWeights(nn.Module):
    """A meta learner: every weight's loss gradient becomes its fast weight, by one network for all weights."""

    #: Gradients below `exp(-RANGE)` are taken as they are, larger ones by their logarithm.
    RANGE = 7.0

    def __init__(self, hidden: Sequence[int], rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(float(rate)))
        self.correction = fully_connected(2, hidden, 1, zero=True)

    def forward(self, gradient: Tensor) -> Tensor:
        scaled = gradient * torch.e**self.RANGE
        seen = torch.stack([scaled.asinh() / self.RANGE, scaled.tanh()], dim=-1)
        return self.correction(seen).squeeze(-1) - self.rate * gradient


def gradients(losses_of: Callable[[Tensor], Tensor], weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Each example's own gradient `[tasks, n, outputs, inputs]` of its loss by a weight that all examples share.

    As in `inner_loop`, it is taken over stacked copies, outside any vmap, and can be differentiated again. `losses_of`
    gives the losses `[tasks, n]`, which are of this shape, from stacked weights.
    """
    meta_gradient = torch.is_grad_enabled()
    stacked = differentiable(weight.expand(*shape, *weight.shape))
    with torch.enable_grad():
        return torch.autograd.grad(losses_of(stacked).sum(), stacked, create_graph=meta_gradient)[0]


def apply_each(weights: Tensor, inputs: Tensor) -> Tensor:
    """Every example by weights of its own: `[tasks, n, outputs]` from `[tasks, n, outputs, d]` and `[tasks, n, d]`."""
    return (weights @ inputs.unsqueeze(-1)).squeeze(-1)


def with_one(features: Tensor) -> Tensor:
    """Features `[tasks, n, d]` with a 1 at their end, whose weight is the bias."""
    return F.pad(features, (0, 1), value=1.0)
