"""The forward pass of common layers with parameters of each task, without `vmap`: the same numbers in fewer operations.

A small network spends its time on the number of operations, not on their size; `vmap` takes about three times as many
as there need be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer, Stack
from mlframework.inner_loop import Params

__all__ = ["forward", "knows"]

#: Applies a module, given its own parameters (those that are stacked, else the module's) and inputs `[tasks, n, ...]`.
Rule = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]


def linear(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = params["weight"], params.get("bias")
    if weight.dim() == 2:  # shared by all tasks
        y = F.linear(x, weight)
    elif x.dim() == 3:
        y = torch.bmm(x, weight.mT)
    else:
        y = torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])
    if bias is None:
        return y
    return y + (bias if bias.dim() == 1 else bias.view(len(bias), *(1 for _ in x.shape[1:-1]), -1))


def flatten(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x.flatten(2)


def elementwise(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return module(x)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Flatten: flatten,
    nn.Identity: elementwise,
    nn.ReLU: elementwise,
    nn.Tanh: elementwise,
    nn.Sigmoid: elementwise,
    nn.SiLU: elementwise,
    nn.Softplus: elementwise,
}

#: Of modules that call those they hold, one after the other.
SEQUENCES = (BaseLayer.forward, Stack.forward, nn.Sequential.forward)


def knows(base_layer: BaseLayer, x: Tensor) -> bool:
    """Whether all modules of a base layer are among those that can be run on inputs `[tasks, n, ...]`."""
    return x.dim() >= 3 and all(
        type(module).forward in SEQUENCES or (type(module) in RULES and plain(module))
        for module in base_layer.modules()
    )


def plain(module: nn.Module) -> bool:
    """Whether a module does what its class says, and nothing that a user hung on it."""
    whole = not isinstance(module, nn.Flatten) or (module.start_dim, module.end_dim) == (1, -1)
    return whole and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def forward(module: nn.Module, params: Params, x: Tensor, prefix: str = "") -> Tensor:
    """What a module that is known makes of inputs.

    Args:
        module: see `knows`.
        params: stacked parameters `[tasks, *shape]` by name; those that are missing are the module's own.
        x: `[tasks, n, ...]`.
        prefix: of the names of the module's parameters.
    """
    if type(module) in RULES:
        own = {name: params.get(prefix + name, p) for name, p in module._parameters.items() if p is not None}
        return RULES[type(module)](module, own, x)
    for name, child in module._modules.items():
        assert child is not None
        x = forward(child, params, x, f"{prefix}{name}.")
    return x
