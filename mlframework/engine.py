"""Two ways to run a function of one task over a meta-batch: vectorised, and as a loop over tasks.

Only the *forward* of a base layer is vectorised; the inner gradient is taken outside, over stacked parameters. Taking it
inside (`vmap(torch.func.grad(loss))`) gives silently wrong second derivatives where a native batch, layer or instance
norm is involved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Engine", "over_tasks"]

Engine = Literal["vectorised", "loop"]


def over_tasks(function: Callable[..., Tensor], *args: Any, engine: Engine) -> Tensor:
    """Applies `function` of one task to every task.

    Args:
        function: takes what `args` holds, without the leading axis.
        args: tensors, or nests of them, whose leaves all start with `[tasks]`.
        engine: `vectorised` (`torch.func.vmap`) or `loop`, which takes modules that cannot be vmapped.

    Returns:
        The results, stacked: `[tasks, ...]`.
    """
    if engine == "vectorised":
        return torch.func.vmap(function, randomness="different")(*args)
    tasks = len(tree_leaves(args)[0])
    return torch.stack([function(*tree_map(lambda leaf, task=task: leaf[task], args)) for task in range(tasks)])
