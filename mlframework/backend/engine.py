"""Two ways to run a function of one task over a meta-batch: vectorised, and as a loop over tasks.

Only the *forward* of a base layer is vectorised; the inner gradient is taken outside, over stacked parameters. Taking
it inside (`vmap(torch.func.grad(loss))`) gives silently wrong second derivatives where a native batch, layer or
instance norm is involved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mlframework.backend.private import tree_flatten, tree_unflatten
from mlframework.backend.tracing import is_traced

__all__ = ["Engine", "over_tasks"]

Engine = Literal["vectorised", "loop"]


def over_tasks(function: Callable[..., Tensor], *args: Any, engine: Engine) -> Tensor:
    """Applies `function` of one task to every task.

    Args:
        function: takes what `args` holds, without the leading axis.
        args: tensors, or nests of them, whose leaves all start with `[tasks]`.
        engine: `vectorised` (`torch.func.vmap`) or `loop`, which takes modules that cannot be vmapped, and is faster
            for a single task: eagerly, that goes by the loop.

    Returns:
        The results, stacked: `[tasks, ...]`.
    """
    leaves, structure = tree_flatten(args)
    if engine == "vectorised" and (len(leaves[0]) > 1 or is_traced()):
        return torch.func.vmap(function, randomness="different")(*args)
    if len(leaves[0]) == 1:  # views, which copy nothing
        return function(*tree_unflatten([leaf.squeeze(0) for leaf in leaves], structure)).unsqueeze(0)
    # unbind rather than an index per task, whose backward fills a tensor of all tasks for each of them.
    tasks = zip(*(leaf.unbind() for leaf in leaves), strict=True)
    return torch.stack([function(*tree_unflatten(list(task), structure)) for task in tasks])
