"""Compiled graphs, kept between processes: tracing a step anew takes seconds, even if everything is compiled.

A graph's file is named by a digest of all that it can depend on: the algorithm with its numbers, shapes, the loaded
sources, torch, and the machine. Had the digest forgotten something, the check of `mlframework.backend.capture` fails,
and the graph is traced anew. A file begins with its signature by the user's key: loading a graph runs code, so that a
file of anybody else, or a damaged one, is not loaded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import pickle
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mlframework.backend.algorithm import Algorithm, tensors_of
from mlframework.backend.machine import name_of
from mlframework.files import atomic, cache_folder, installed_places
from mlframework.keys import LENGTH, is_signed, sign
from mlframework.reading import MOST_WEIGHTS, read_bytes

__all__ = ["GraphCache"]

Graph = TypeVar("Graph")

#: Seconds after which an unused file is removed.
UNUSED_SECONDS = 30 * 24 * 3600

#: Environment variables that set torch's compiler, but for the one that names its folder.
SWITCHES, FOLDER = ("TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_"), "TORCHINDUCTOR_CACHE_DIR"

#: Numbers of an array above which it is data: a graph depends on its shape alone.
LARGE = 2**20

log = logging.getLogger(__name__)


class GraphCache:
    """Graphs in the cache folder, loaded and kept only within `checked`."""

    def __init__(self) -> None:
        self.checking = False
        #: The files of loaded graphs, and the graphs to be kept with their files.
        self.loaded: list[Path] = []
        self.new: list[tuple[Path, Any]] = []
        #: Files that did not pass the check.
        self.refused: set[Path] = set()

    def get(self, build: Callable[[], Graph], meta_layer: Algorithm, *question: Any) -> Graph:
        """The graph of a meta layer that answers a question, from the cache folder or else built."""
        file = file_of(meta_layer, question) if self.checking else None
        if file is None:
            return build()
        graph = None if file in self.refused else load(file)
        if graph is None:
            self.new.append((file, graph := build()))
        else:
            self.loaded.append(file)
        return graph

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Within this context graphs may be built or loaded; if it ends well, the new ones are kept."""
        self.checking = True
        try:
            yield
            for file, graph in self.new:
                save(graph, file)
            if self.new:
                remove_old(self.new[0][0].parent)
            self.loaded.clear()
        finally:
            self.checking = False
            self.new.clear()

    def forget(self) -> bool:
        """No longer loads what was since the last check that went well; returns whether there was anything."""
        some = bool(self.loaded)
        self.refused.update(self.loaded)
        self.loaded.clear()
        return some


def load(file: Path) -> Any | None:
    """The graph in a file, or None."""
    try:
        content = read_bytes(file, most=MOST_WEIGHTS)
        if not is_signed(content[:LENGTH], file.name, content[LENGTH:]):
            raise ValueError("this user did not write it, or it is damaged")
        graph = pickle.loads(zlib.decompress(content[LENGTH:]))
        os.utime(file)
        return graph
    except Exception as error:  # there is none, it is damaged, or files that it refers to are gone: all kinds
        log.debug("capture: %s is traced anew: %s", file, error)
        return None


def save(graph: Any, file: Path) -> None:
    """Keeps a graph; one that cannot be kept is traced anew in every process."""
    try:
        content = zlib.compress(pickle.dumps(graph), level=1)
        if (signature := sign(file.name, content)) is None:
            return
        with atomic(file) as part:
            part.write_bytes(signature + content)
    except Exception as error:  # a full disk, or something in a graph that cannot be pickled
        log.debug("capture: %s is not kept: %s", file, error)


def remove_old(folder: Path) -> None:
    """Removes files that no process has loaded for long."""
    for file in folder.glob("*.pickle.z"):
        with suppress(OSError):  # another process may remove it at the same time
            if file.stat().st_mtime < time.time() - UNUSED_SECONDS:
                file.unlink()


def file_of(meta_layer: Algorithm, question: tuple[Any, ...]) -> Path | None:
    """The file of the answer to a question; None if something that it depends on cannot be written down."""
    # The number of the outer step makes no difference, or is refused.
    ignored = ("outer_step", "constructor_arguments")
    numbers = {name: value for name, value in vars(meta_layer).items() if name not in ignored}
    description = Description(tensors_of(meta_layer))
    try:
        text = description.of((question, type(meta_layer), numbers))
        devices = sorted({name_of(tensor.device) for tensor in description.tensors})
        plain = constants(description.classes | description.modules())
        digest = hashlib.sha256(str([*surroundings(), devices, plain]).encode() + text + sources(description.modules()))
    except Exception as error:  # objects that cannot be pickled raise all kinds
        log.debug("capture: %s is traced in every process: %s", question[0], error)
        return None
    return cache_folder() / "graphs" / f"{digest.hexdigest()[:32]}.pickle.z"


class Description(pickle.Pickler):
    """Writes values down to compare them: the same bytes in every process. Of `inputs` only the shape matters."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=5)
        self.fast = True  # no references to earlier values: which of them are one object is chance
        self.inputs = {id(x): name for name, x in inputs.items()}
        self.tensors = list(inputs.values())
        #: The classes of all values, with their bases, and the modules of functions.
        self.classes: set[Any] = set()
        self.of_functions: set[str] = set()

    def of(self, value: Any) -> bytes:
        self.dump(value)
        return self.file.getvalue()

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            looks = (tuple(value.shape), value.stride(), str(value.dtype), str(value.device), value.requires_grad)
            name = self.inputs.get(id(value))
            return looks, name or (digest_of(value.detach().cpu().numpy()) if value.numel() <= LARGE else "")
        if isinstance(value, np.ndarray) and value.dtype != object:
            return value.shape, value.dtype.str, digest_of(value) if value.size <= LARGE else ""
        if isinstance(value, (set, frozenset)):
            return type(value).__name__, sorted(map(repr, value))
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        self.classes.update((value if isinstance(value, type) else type(value)).__mro__)
        if module := getattr(value, "__module__", None):
            self.of_functions.add(module)
        return NotImplemented

    def modules(self) -> set[Any]:
        """The modules that define these classes and functions, but Python's and torch's; they must be files."""
        names = {kind.__module__ for kind in self.classes} | self.of_functions
        own = {sys.modules[name] for name in names if name.partition(".")[0] not in (*sys.stdlib_module_names, "torch")}
        own |= {sys.modules[name] for name in names & {"__main__"}}
        for module in own:
            if not os.path.isfile(getattr(module, "__file__", None) or ""):
                raise TypeError(f"{module.__name__} is no file")
        return own


def constants(namespaces: Iterable[Any]) -> list[Any]:
    """Plain values that classes and modules hold, which other code may have set."""
    plain = (int, float, str, bool, tuple, type(None))
    return sorted(
        (space.__module__ if isinstance(space, type) else "", space.__name__, name, repr(value))
        for space in namespaces
        for name, value in vars(space).items()
        if isinstance(value, plain) and not name.startswith("__")
    )


def digest_of(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def surroundings() -> list[Any]:
    """The machine, torch, and settings for all of it."""
    return [
        processor(),
        torch.__version__,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cpu.get_cpu_capability(),
        sorted((name, value) for name, value in os.environ.items() if name.startswith(SWITCHES) and name != FOLDER),
    ]


@functools.cache
def processor() -> list[str]:
    """The processor that code is compiled for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


def sources(modules: Iterable[Any]) -> bytes:
    """A digest of this package's files, of some modules' files, and of every loaded module outside site-packages."""
    places = installed_places()
    files = {str(file) for file in Path(__file__).parents[1].rglob("*.py")} | {module.__file__ for module in modules}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.endswith(".py") and not file.startswith(places) and name.partition(".")[0] != "torch":
            files.add(file)
    digest = hashlib.sha256()
    for file in sorted(filter(os.path.isfile, files)):
        digest.update(file.encode() + Path(file).read_bytes())
    return digest.digest()
