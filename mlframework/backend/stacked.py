"""The forward pass of common layers with parameters of each task, without `vmap`: the same numbers in fewer operations.

A small network spends its time on the number of operations, not on their size; `vmap` takes about three times as many
as there need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mlframework.backend.operators import is_traced
from mlframework.backend.sequence_operators import across, to_unit_mean_square
from mlframework.base_layers.base_layer import BaseLayer, Composed, Stack
from mlframework.base_layers.transformer import RMSNorm
from mlframework.episode import Params

__all__ = ["expanded", "forward", "knows"]

#: Applies a module, given its own parameters (those that are stacked, else the module's) and inputs `[tasks, n, ...]`.
Rule = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]


def linear(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = params["weight"], params.get("bias")
    if weight.dim() == 2:  # shared by all tasks
        y = F.linear(x, weight)
    elif x.dim() == 3 and bias is not None and not is_traced():  # a compiler has the sum for nothing, with what follows
        return torch.baddbmm(per_task(bias, x), x, weight.mT)
    elif x.dim() == 3:
        y = torch.bmm(x, weight.mT)
    else:
        y = across(x.flatten(1, -2), weight).unflatten(1, x.shape[1:-1])
    if bias is None:
        return y
    return y + per_task(bias, x)


def per_task(vector: Tensor, x: Tensor) -> Tensor:
    """A vector that all tasks share, or one of each, shaped to go with `x` `[tasks, n, ..., d]`."""
    return vector if vector.dim() == 1 else vector.view(vector.shape[0], *[1] * (x.dim() - 2), -1)


def embedding(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight = params["weight"]
    if weight.dim() == 2:
        return F.embedding(x, weight)
    # One table, of which each task has its own part.
    first = torch.arange(len(weight), device=x.device) * weight.shape[1]
    return F.embedding(x + first.view(-1, *(1 for _ in x.shape[1:])), weight.flatten(0, 1))


def rms_norm(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    assert isinstance(module, RMSNorm)
    return to_unit_mean_square(x, module.eps) * per_task(params["weight"], x)


def flatten(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x.flatten(2)


def elementwise(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return module.forward(x)  # nobody has hung anything on it, see `plain`


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    RMSNorm: rms_norm,
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


def expanded(base_layer: nn.Module, names: Iterable[str], num_tasks: int) -> dict[str, Tensor]:
    """Parameters `[*shape]` of those names as stacks `[num_tasks, *shape]` that are all alike: views.

    Weights of linear layers lie transposed, `[in, out]`, as their gradients for stacks do: steps along them, and
    products with them, then go through memory from end to end. For a single task, turning them over would not pay.
    """
    stacks = {}
    for name in names:
        *path, own = name.split(".")
        owner = base_layer
        for part in path:  # rather than by attributes, which modules take a while to find
            owner = cast("nn.Module", owner._modules[part])
        p = cast("Tensor", owner._parameters[own])
        if num_tasks == 1:
            stacks[name] = p.unsqueeze(0)
        elif p.dim() == 2 and own == "weight" and isinstance(owner, nn.Linear):
            stacks[name] = p.mT.contiguous().expand(num_tasks, -1, -1).mT
        else:
            stacks[name] = p.expand(num_tasks, *p.shape)
    return stacks


def knows(base_layer: BaseLayer, x: Tensor) -> bool:
    """Whether all modules of a base layer are among those that can be run on inputs `[tasks, n, ...]`.

    Not while there are hooks on all modules, which would see nothing: here no module is called.
    """
    return x.dim() >= 3 and is_known(base_layer) and not _has_any_global_hook()


def is_known(module: nn.Module) -> bool:
    """Whether a module and all that it holds can be run. Every call asks, so it takes a short way."""
    if type(module) in RULES:
        return plain(module)
    known = type(module).forward in SEQUENCES or (type(module).forward is Composed.forward and plain(module))
    return known and all(is_known(child) for child in module._modules.values() if child is not None)


def plain(module: nn.Module) -> bool:
    """Whether a module does what its class says, and nothing that a user hung on it."""
    whole = not isinstance(module, nn.Flatten) or (module.start_dim, module.end_dim) == (1, -1)
    if isinstance(module, nn.Embedding):
        whole = module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return whole and not hooks


def forward(module: nn.Module, params: Params, x: Tensor, mask: Tensor | None = None, *, prefix: str = "") -> Tensor:
    """What a module that is known makes of inputs.

    Args:
        module: see `knows`.
        params: stacked parameters `[tasks, *shape]` by name; those that are missing are the module's own.
        x: `[tasks, n, ...]`.
        mask: `[tasks, n, ...]`, what counts; None: all.
        prefix: of the names of the module's parameters.
    """
    if type(module) in RULES:
        own = {name: params.get(prefix + name, p) for name, p in module._parameters.items() if p is not None}
        return RULES[type(module)](module, own, x)
    if isinstance(module, Composed):

        def run(name: str, x: Tensor) -> Tensor:
            child = module._modules[name]
            assert child is not None
            return forward(child, params, x, mask, prefix=f"{prefix}{name}.")

        return module.through(run, x, mask)
    for name, child in module._modules.items():
        assert child is not None
        x = forward(child, params, x, mask, prefix=f"{prefix}{name}.")
    return x
