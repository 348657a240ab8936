"""The forward pass of common layers with parameters of each task, without `vmap`: the same numbers in fewer operations.

A small network spends its time on the number of operations, not on their size; `vmap` takes about three times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlframework.backend.convolve import convolve, max_pool
from mlframework.backend.normalise import normalise
from mlframework.backend.private import children_of, is_hooked, parameters_of
from mlframework.backend.products import product
from mlframework.backend.tracing import is_traced
from mlframework.episode import Params

__all__ = [
    *("batch_norm", "by_vmap", "differentiable_attention", "forward", "per_task", "repeated"),
    *("runs_in_turn", "runs_parts", "runs_per_task", "runs_together", "supports"),
]

#: Applies a module to inputs `[tasks, n, ...]` with a mask `[tasks, n, ...]` or None. The parameters are the module's
#: own, by name: as they are where all tasks share them, else stacked, `[tasks, *shape]`.
Rule = Callable[[Any, Mapping[str, Tensor], Tensor, Tensor | None], Tensor]

#: By the exact type of a module, its rule, and whether the rule suits a module's settings.
RULES: dict[type[nn.Module], tuple[Rule, Callable[[Any], bool]]] = {}

#: By the exact type of a module that treats each example alone, whether all tasks' examples may share a pass.
TOGETHER: dict[type[nn.Module], Callable[[Any], bool]] = {}

#: For each `forward` that only runs the module's parts: how, given the module, `run(name, x)`, `x` and the mask.
PARTS: dict[Callable[..., Any], Callable[..., Tensor]] = {}


def runs_per_task(kind: type[nn.Module], rule: Rule, *, when: Callable[[Any], bool] = lambda module: True) -> None:
    """Registers how a layer runs with parameters of each task; without a rule it runs under `vmap`.

    Args:
        kind: the class of the layer; subclasses do not inherit the rule.
        rule: gives the layer's output `[tasks, n, ...]`, differentiable as often as the layer itself.
        when: whether the rule suits a layer's settings.

    `runs_per_task(Scale, lambda layer, params, x, mask: x * per_task(params["weight"], x))`
    """
    RULES[kind] = rule, when


def runs_parts(forward: Callable[..., Any]) -> None:
    """Registers a `forward` that only runs the module's parts, as its method `through(run, x, mask)` says.

    `run(name, x)` calls the part of that name; `through` must work with an axis of tasks in front of `x` and `mask`. A
    subclass that overrides `forward` runs under `vmap`.
    """
    PARTS[forward] = lambda module, run, x, mask: module.through(run, x, mask)


def runs_together(kind: type[nn.Module], *, when: Callable[[Any], bool]) -> None:
    """Registers a module whose output for an example depends on that example alone, `when` its settings say so.

    Where no task has parameters of its own for it, all tasks' examples go through it in one pass; else it runs under
    `vmap`. Subclasses do not inherit this.
    """
    TOGETHER[kind] = when


def together(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The output `[tasks, n, ...]` of such a module, with the stacked parameters that belong to it."""
    with differentiable_attention():
        if params:
            return by_vmap(module, params, x)
        return module.forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Within this context torch's attention can be differentiated twice, in evaluation mode too.

    Its fast path for evaluation mode has no derivative; the flash kernels have a first one, but no second.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def runs_in_turn(forward: Callable[..., Any]) -> None:
    """Registers a `forward` that runs the module's parts one after the other, as that of `nn.Sequential`."""
    PARTS[forward] = in_turn


def in_turn(module: nn.Module, run: Callable[[str, Tensor], Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    for name in children_of(module):
        x = run(name, x)
    return x


def per_task(vector: Tensor, x: Tensor) -> Tensor:
    """A vector that all tasks share, or one of each `[tasks, d]`, shaped to go with `x` `[tasks, n, ..., d]`."""
    return vector if vector.dim() == 1 else vector.view(vector.shape[0], *[1] * (x.dim() - 2), -1)


def linear(module: nn.Linear, params: Mapping[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    weight, bias = params["weight"], params.get("bias")
    if weight.dim() == 2:  # shared by all tasks
        y = F.linear(x, weight)
    elif x.dim() == 3 and bias is not None and not is_traced():  # a compiler fuses the sum with its neighbours anyway
        return torch.baddbmm(per_task(bias, x), x, weight.mT)
    elif x.dim() > 3 and is_traced():
        y = product(x.flatten(1, -2), weight).unflatten(1, x.shape[1:-1])
    else:
        y = torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])
    return y if bias is None else y + per_task(bias, x)


def embedding(module: nn.Embedding, params: Mapping[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    weight = params["weight"]
    if weight.dim() == 2:
        return F.embedding(x, weight)
    # One table, of which each task has its own part.
    first = torch.arange(len(weight), device=x.device) * weight.shape[1]
    return F.embedding(x + first.view(-1, *(1 for _ in x.shape[1:])), weight.flatten(0, 1))


def max_pool2d(module: nn.MaxPool2d, params: Mapping[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    if is_traced() and module.kernel_size in (2, (2, 2)):
        return max_pool(x)
    images = x.transpose(0, 1)  # as convolutions leave them in memory
    return module.forward(images.flatten(0, 1)).unflatten(0, images.shape[:2]).transpose(0, 1)


def batch_norm(module: Any, params: Mapping[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    """The rule of a batch norm by its examples' own statistics, with `weight`, `bias` and `eps`; masked, by `vmap`."""
    if mask is not None:
        return by_vmap(module, params, x, mask)
    weight, bias = (params[name].expand(len(x), -1) for name in ("weight", "bias"))
    return normalise(x, weight, bias, module.eps)


def by_vmap(module: nn.Module, params: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
    """The output of a single layer under `vmap`, so that the layers around it can keep their rules."""
    own = dict(module.named_parameters())
    dims = {name: 0 if p.dim() > own[name].dim() else None for name, p in params.items()}

    def one_task(params: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, inputs)

    return torch.func.vmap(one_task, (dims, *(0 for _ in inputs)))(dict(params), *inputs)


def is_plain(module: nn.Conv2d) -> bool:
    is_string = isinstance(module.padding, str)
    return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros" and not is_string


def is_common(module: nn.MaxPool2d) -> bool:
    """Whether the pools lie side by side."""
    rest = module.padding, module.dilation, module.ceil_mode, module.return_indices
    return module.stride == module.kernel_size and rest == (0, 1, False, False)


runs_in_turn(nn.Sequential.forward)
runs_per_task(
    nn.Conv2d,
    lambda module, params, x, mask: convolve(x, params["weight"], params.get("bias"), module.stride, module.padding),
    when=is_plain,
)
runs_per_task(nn.MaxPool2d, max_pool2d, when=is_common)
runs_per_task(nn.Linear, linear)
runs_per_task(
    nn.Embedding, embedding, when=lambda e: e.padding_idx is None and e.max_norm is None and not e.scale_grad_by_freq
)
runs_per_task(
    nn.Flatten, lambda module, params, x, mask: x.flatten(2), when=lambda m: (m.start_dim, m.end_dim) == (1, -1)
)
for kind in (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus):
    runs_per_task(kind, lambda module, params, x, mask: module.forward(x))


def repeated(module: nn.Module, names: Iterable[str], num_tasks: int) -> dict[str, Tensor]:
    """Parameters of a module by name, the same for each task: views `[num_tasks, *shape]`.

    Of several tasks, weights of linear layers lie transposed, `[in, out]`, as their gradients do: steps along them, and
    products with them, then go through memory from end to end.
    """
    stacks = {}
    for name in names:
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        p = getattr(owner, own)
        if num_tasks == 1:
            stacks[name] = p.unsqueeze(0)
        elif p.dim() == 2 and own == "weight" and isinstance(owner, nn.Linear):
            stacks[name] = p.mT.contiguous().expand(num_tasks, -1, -1).mT
        else:
            stacks[name] = p.expand(num_tasks, *p.shape)
    return stacks


def supports(module: nn.Module, x: Tensor) -> bool:
    """Whether `forward` can run a module on inputs `[tasks, n, ...]`; not where there are hooks: it calls none."""
    return x.dim() >= 3 and has_rule(module)


def has_rule(module: nn.Module) -> bool:
    """Whether there are rules for a module and all its parts. Every call asks, so this is short."""
    if is_hooked(module):
        return False
    if type(module) in RULES:
        return RULES[type(module)][1](module)
    if type(module) in TOGETHER:
        return TOGETHER[type(module)](module)
    parts = (part for part in children_of(module).values() if part is not None)
    return type(module).forward in PARTS and all(map(has_rule, parts))


def forward(module: nn.Module, params: Params, x: Tensor, mask: Tensor | None = None, *, prefix: str = "") -> Tensor:
    """The output `[tasks, n, ...]` of a module that is supported, for `x` and `mask` as in a `Rule`.

    `params` are stacked `[tasks, *shape]`, by names with the prefix; those that are missing are the module's own.
    """
    if type(module) in RULES:
        own = {name: params.get(prefix + name, p) for name, p in parameters_of(module).items() if p is not None}
        return RULES[type(module)][0](module, own, x, mask)
    if type(module) in TOGETHER:
        inside = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        return together(module, inside, x)

    def run(name: str, x: Tensor) -> Tensor:
        part = cast("nn.Module", children_of(module)[name])
        return forward(part, params, x, mask, prefix=f"{prefix}{name}.")

    return PARTS[type(module).forward](module, run, x, mask)
