"""The first inner gradient of each task, taken where all tasks still share the weights: without a copy for each.

A task's gradient by the weights of a linear layer is its gradient by what the layer puts out, times what the layer was
given. Taken so, derivatives of it are by the weights that are shared: one product over the examples of all tasks, where
stacks have one for each task, and sums of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from mlframework.backend.stacked import SEQUENCES
from mlframework.base_layers.base_layer import BaseLayer, Composed
from mlframework.episode import Params

__all__ = ["gradients", "suits"]

#: By the name of a layer: what it was given, and what it made of it.
Used = dict[str, tuple[Tensor, Tensor]]


def suits(base_layer: BaseLayer, names: Collection[str]) -> bool:
    """Whether the named parameters are of linear layers, in a sequence of modules; see `stacked.knows`, too."""
    modules = dict(base_layer.named_modules())
    composed = any(isinstance(module, Composed) for module in modules.values())
    return not composed and all(isinstance(modules[name.rpartition(".")[0]], nn.Linear) for name in names)


def gradients(
    base_layer: BaseLayer,
    losses_of: Callable[[Tensor], Tensor],
    params: Params,
    x: Tensor,
    *,
    create_graph: bool,
) -> Params:
    """Each task's gradient of its loss where its parameters are the base layer's own.

    Args:
        base_layer: see `suits`.
        losses_of: the loss of each task `[tasks]`, given predictions `[tasks, n, out_features]`.
        params: what is differentiated by, stacked: repeats the base layer's own. Gradients lie in memory as they do.
        x: `[tasks, n, ...]`.
        create_graph: whether gradients can be differentiated again.
    """
    used: Used = {}
    tasks, n = x.shape[:2]
    prediction = forward(base_layer, x.flatten(0, 1), params, used)
    losses = losses_of(prediction.view(tasks, n, *prediction.shape[1:]))
    outputs = [y for _, y in used.values()]
    found = torch.autograd.grad(losses, outputs, torch.ones_like(losses), create_graph=create_graph)
    grads = {}
    with torch.set_grad_enabled(create_graph):
        for (prefix, (given, _)), grad in zip(used.items(), found, strict=True):
            given, grad = (rows.reshape(tasks, -1, rows.shape[-1]) for rows in (given, grad))
            if (weight := params.get(f"{prefix}weight")) is not None:
                turned = weight.stride(-1) != 1
                grads[f"{prefix}weight"] = torch.bmm(given.mT, grad).mT if turned else torch.bmm(grad.mT, given)
            if f"{prefix}bias" in params:
                grads[f"{prefix}bias"] = grad.sum(1)
    return grads


def forward(module: nn.Module, x: Tensor, params: Params, used: Used, *, prefix: str = "") -> Tensor:
    """What a module makes of examples `[tasks * n, ...]`; notes how it uses the linear layers that have parameters."""
    if type(module).forward in SEQUENCES:
        for name, child in module._modules.items():
            assert child is not None
            x = forward(child, x, params, used, prefix=f"{prefix}{name}.")
        return x
    # What is overwritten has no gradient any more.
    y = module.forward(x.clone() if getattr(module, "inplace", False) else x)
    if isinstance(module, nn.Linear) and (f"{prefix}weight" in params or f"{prefix}bias" in params):
        used[prefix] = x, y
    return y
