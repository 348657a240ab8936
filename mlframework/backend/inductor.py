"""Graphs compiled by inductor, with our settings, and kept in our folder."""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from mlframework.backend.algorithm import Algorithm
from mlframework.backend.graph_passes import lay_out
from mlframework.backend.private import (
    compile_graph,
    compiler_folder,
    compiler_settings,
    knowing_shapes,
    remember_indices,
    restore_code,
)
from mlframework.files import cache_folder
from mlframework.keys import private_folder, sign

__all__ = ["CompiledGraph", "compiled", "keep_compiled_files"]

log = logging.getLogger(__name__)


def compiled(graph: fx.GraphModule, meta_layer: Algorithm, **settings: Any) -> CompiledGraph:
    """Compiles a graph whose nodes have their fake tensors, with settings for inductor beside our usual ones."""
    remember_indices()
    keep_strides(graph)
    lay_out(graph.graph)
    graph.recompile()
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    settings = {**inductor_settings(meta_layer), **settings}
    keep_compiled_files()
    with compiler_settings(settings), knowing_shapes(inputs):
        return CompiledGraph(compile_graph(graph, inputs, cpp_wrapper=settings.get("cpp_wrapper", False)), settings)


class CompiledGraph:
    """A compiled function of a list of tensors, which it empties; its `code` refers to files in inductor's folder."""

    def __init__(self, code: Any, settings: dict[str, Any]) -> None:
        self.code, self.settings = code, settings

    def __call__(self, inputs: list[Tensor]) -> Any:
        # `code` itself asks about tracing and tuning first.
        return (getattr(self.code, "current_callable", None) or self.code)(inputs)

    def __getstate__(self) -> Any:
        code = copy.copy(self.code)
        code.prepare_for_serialization()
        return code, self.settings

    def __setstate__(self, state: Any) -> None:
        self.code, self.settings = state
        keep_compiled_files()
        with compiler_settings(self.settings):
            restore_code(self.code)


def keep_strides(graph: fx.GraphModule) -> None:
    """Tells inductor to keep the strides of results as traced: the backward pass was compiled for them."""
    (output,) = graph.graph.find_nodes(op="output")
    found = [index for index, node in enumerate(output.args[0]) if isinstance(node, fx.Node)]
    output.meta["user_visible_output_idxs"] = found


def keep_compiled_files() -> None:
    """Names the folder of compiled files, unless the user has."""
    # torch names its own, which does not outlive the system's temporary files, as soon as there is an optimizer.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiler_folder()) == compiler_folder():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder_of_code(cache_folder()))


def folder_of_code(cache: Path) -> Path:
    """A folder for the compiler's files, which it loads as code without looking at them: only this user writes there.

    Its name follows from the user's key, so that a cache that was copied from somebody else brings none.
    """
    name = sign("inductor")
    folder = None if name is None else private_folder(cache / f"inductor-{name.hex()[:16]}")
    return folder or folder_of_process(cache)


@functools.cache
def folder_of_process(cache: Path) -> Path:
    """A folder that is removed when the process ends."""
    log.warning("%s: compiled code is not kept: other users can write here, or you have no key (SECURITY.md)", cache)
    folder = tempfile.mkdtemp(prefix="mlframework-inductor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def inductor_settings(meta_layer: Algorithm) -> dict[str, Any]:
    """Our differences from inductor's defaults, for the device of the meta layer."""
    if next(meta_layer.parameters()).device.type != "cpu":
        return {}
    # inductor's layouts would undo that of images, which `lay_out` chose.
    settings: dict[str, Any] = {"cpp_wrapper": True, "layout_optimization": False}
    settings["cpp.enable_floating_point_contract_flag"] = "fast"
    if "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS" not in os.environ:
        # They save a second or two of each graph, and take ten, once, and 150 MB of temporary files.
        settings["cpp_cache_precompile_headers"] = False
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        # inductor writes vectors itself and turns the C++ compiler's own vectorising off, but its masks need that: they
        # are ten times slower without. The flag is handed over after the one that turns it off.
        settings["cpp.march"] = "native -ftree-loop-vectorize"
    return settings
