"""Learning in context: the support set stands in front of what is to be predicted, and the network reads on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mlframework.base_layers.recall import is_recalling, readers, recalled, recalling, split
from mlframework.episode import Examples
from mlframework.meta_layers.meta_layer import MetaLayer

__all__ = ["InContext", "Prompt"]


class Prompt(NamedTuple):
    x: Tensor  # tokens of the support set, row after row, [tasks, positions]
    mask: Tensor  # [tasks, positions], 1 where a token counts


class InContext(MetaLayer):
    """Adapts by reading: the support set's sequences are put before each query sequence, and nothing else changes.

    The base layer, a causal sequence model, is the meta layer too: its memory of the prompt is the task's model.
    `adapt` lines the support set up, `predict` lets the base layer read it and go on with the queries: once for all of
    them if the network `Recalls`, else once for each.

    Args:
        base_layer: must take sequences longer than the task's, and leave out what a mask leaves out.
        task, frozen, batch_norm: see `MetaLayer`.

    Reference: Brown et al., Language Models are Few-Shot Learners, 2020, arXiv:2005.14165, section 2; meta-trained for
        it as in Min et al., MetaICL, 2022, arXiv:2110.15943, section 3.
    """

    kinds = ("sequence",)
    support_order_matters = True

    def adapt(self, support: Examples) -> Prompt:
        return Prompt(support.x.flatten(1), support.mask.flatten(1))

    def predict(self, adapted: Prompt, x: Tensor, mask: Tensor | None = None) -> Tensor:
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
