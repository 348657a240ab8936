"""Every private name of torch that this package uses; no other file names one. Hydra's are in `cli/private.py`.

Each stands with its reason and what happens without it. Tried with torch 2.13.0; the oldest torch that was tried is the
one in pyproject.toml. The compiler's names are looked up when a step is captured: without them steps are eager, and one
line says why. Without another one, importing the package fails.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _functorch
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.stateless import _reparametrize_module
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import (
    tree_flatten as tree_flatten,
    tree_leaves as tree_leaves,
    tree_map as tree_map,
    tree_map_only as tree_map_only,
    tree_unflatten as tree_unflatten,
)

# Of nests of tensors torch has no public functions: without `tree_flatten` and the like, recursive ones of our own.

# `TorchDispatchMode` sees every operation, to count operations and bytes. It is documented, but not exported; without
# it neither `memory_limit` nor the choice between a whole step and regions works.


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no numbers, as while tracing; without it a try around reading a number."""
    return isinstance(tensor, FakeTensor)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16; without it a CPU that emulates it, far slower, is not told apart."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def gradient_is_batched(grad: Tensor) -> bool:
    """Whether a gradient stands for many (`is_grads_batched`); without it those of batch norm have no derivative."""
    return _functorch.is_legacy_batchedtensor(grad)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; without it a write of the same values goes unnoticed."""
    return tensor._version


def storage_key(storage: torch.UntypedStorage) -> int:
    """Identifies memory that tensors share, also where it has no address, as while tracing."""
    return storage._cdata


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor of numbers copied, in one kernel of a GPU; without it one for each."""
    return list(torch._foreach_mul(list(tensors), 1))


#: An operator that graphs hold.
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def is_mutable(target: Any) -> bool:
    """Whether an operator writes to its arguments."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Keeps checkpoints from hooking what a traced function saves.

    `torch.autograd.graph.disable_saved_tensors_hooks` refuses where there are hooks: no checkpointed step could be
    compiled.
    """
    torch._C._autograd._saved_tensors_hooks_disable("a traced function keeps its tensors itself", False)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_enable()


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters. Attributes and `named_parameters` take longer than a small operation."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that it holds, each as often as it is held: `named_children` leaves repeated ones out."""
    return module._modules


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooked into calls of a module, or of all, of which a pass without calls would know nothing."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or _has_any_global_hook()


def swap_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> AbstractContextManager[Any]:
    """Within this context tensors stand in for parameters and buffers, by name, or by both names; others stay.

    `torch.func.functional_call` does so for one call, and does not put back the parameters of a module that is held
    twice (pytorch/pytorch issue 164759; open in 2.13). `stack_weights` puts them back in reverse order: those as well.
    """
    return _reparametrize_module(module, tensors, tie_weights=True, stack_weights=True)


def optimizer_has_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody hooked into steps of an optimizer, or of all; True where torch keeps hooks under other names."""
    own = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    everywhere = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    places = ((optimizer, own), (sys.modules[Optimizer.__module__], everywhere))
    return any(getattr(place, name, True) for place, names in places for name in names)


def increment(counts: list[Tensor]) -> None:
    """Adds one to every tensor, in one kernel."""
    torch._foreach_add_(counts, 1)


def fused_adam(decoupled: bool) -> Callable[..., None]:
    """The kernel of fused Adam or AdamW; without it `optimizer.step()`, mostly Python on a small network."""
    return torch._fused_adamw_ if decoupled else torch._fused_adam_


# `torch.compile` cannot trace `torch.autograd.grad` with `create_graph`, nor run the passes of `graph_passes`. So
# `make_fx` traces, and inductor's inner function compiles.


def decompositions() -> dict[Any, Any]:
    """Into what inductor breaks operators down: what the passes of `graph_passes` look for."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any], *, cpp_wrapper: bool) -> Any:
    """What inductor makes of a graph: a function of a list of tensors."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(graph, inputs, cpp_wrapper=cpp_wrapper)


def restore_code(code: Any) -> None:
    """Loads unpickled code from inductor's cache; without it every process traces and looks up anew, for seconds."""
    from torch._inductor.output_code import CompiledFxGraphConstants

    constants = CompiledFxGraphConstants()
    code.after_deserialization(constants)
    code.post_compile((), constants, code.fx_kwargs)


@contextmanager
def compiler_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Inductor with the settings that its version has (2.8 has no `cpp.march`); `torch.compile` sets its own alone."""
    from torch._inductor import config

    with config.patch({name: value for name, value in settings.items() if hasattr(config, name)}):
        yield


def compiler_folder() -> str:
    """Where inductor keeps what it compiles, unless it is told: among temporary files, which do not last."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def knowing_shapes(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """Tells inductor the shapes of a graph's inputs, fake tensors; without it inductor does not look into its cache."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = torch._guards.detect_fake_mode(inputs)
    if mode is None:
        return nullcontext()
    mode.shape_env = mode.shape_env or ShapeEnv()
    return torch._guards.tracing(torch._guards.TracingContext(mode))


def partition(graph: fx.GraphModule, *, outputs: int, keep_all: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A joint graph as a forward and a backward pass; without it no region can be compiled."""
    from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

    parts = default_partition if keep_all else min_cut_rematerialization_partition
    # Elementwise results are computed anew wherever that keeps less: a step waits for memory more than for arithmetic.
    with torch._functorch.config.patch(aggressive_recomputation=True):
        return parts(graph, (), num_fwd_outputs=outputs)


#: Lets `make_fx` trace through tensors that are no inputs, as a task's own tables: they are constants of the graph.
WITH_CONSTANTS: dict[str, Any] = {"_allow_non_fake_inputs": True}


def remember_indices() -> None:
    """A patch: inductor's cache of simplified indices holds 128, and graphs of Conv4 ask for thousands.

    pytorch/pytorch issue 133734; needless once pull request 186319 (open in 2.13) is in a release. Without the patch
    Conv4 compiles in 55 rather than 42 s, to the same.
    """
    from torch._inductor import sizevars

    simplify: Any = getattr(sizevars, "simplify_index_in_vec_range", None)
    if hasattr(simplify, "cache_parameters") and simplify.cache_parameters()["maxsize"] == 128:
        sizevars.simplify_index_in_vec_range = functools.lru_cache(maxsize=8192)(simplify.__wrapped__)


def import_compiler() -> None:
    """Imports torch's compiler, as torch's optimizers do, in half of the time: nothing in it is garbage to collect."""
    if "torch._dynamo" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        importlib.import_module("torch._dynamo")
    finally:
        gc.freeze()
        gc.enable()
