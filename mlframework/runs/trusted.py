"""Which code a stored config may name: it comes from somebody else, unless the user's own key has signed it.

A `_target_` is called when a run is evaluated, resumed or loaded. A stored config may name classes of this package, of
installed plug-ins, and the estimators and optimizers that go with them. Any other name needs the user: their signature,
or their word on the command line or in Python. SECURITY.md has the rules for users.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlframework.errors import InvalidValue, UserError
from mlframework.files import as_json, installed_places
from mlframework.keys import is_signed, sign
from mlframework.reading import MOST_RECORD, read_json, read_text
from mlframework.runs.check_config import located, not_imported

__all__ = [
    "SIGNATURE",
    "TRUST",
    "check_overrides",
    "check_stored",
    "is_known",
    "is_of_plug_in",
    "signature_of",
    "trust",
    "vouching",
]

#: The file of the signature in a run folder, and the files that it is about.
SIGNATURE, SIGNED = "signature.json", ("config.yaml", "overrides.yaml", "choices.json")

#: The environment variable with the names that the user trusts, which launchers' workers inherit.
TRUST = "MLFRAMEWORK_TRUST"

#: The group of entry points in which a package names its config folder.
GROUP = "mlframework.conf"

#: Names of this package: classes in the public tables of these rooms.
OWN = re.compile(
    r"mlframework\.(base_layers|evaluation|inner_loop|meta_layers|regularisers|tasks|training|runs)\.([A-Z]\w*)"
)
OF_RUNS = ("Ensemble",)

#: Names of other packages: classes that compute, and neither read files nor call what a text names.
ELSEWHERE = re.compile(
    r"torch\.optim\.([A-Z]\w*|lr_scheduler\.[A-Z]\w*)"
    r"|torch\.nn\.[A-Z]\w*"
    r"|sklearn\.(ensemble|gaussian_process|linear_model|neighbors|neural_network|svm|tree)\.[A-Z]\w*"
    r"|sklearn\.(kernel_ridge\.KernelRidge|naive_bayes\.\w+NB|discriminant_analysis\.\w+Analysis|dummy\.Dummy\w+)"
)

#: Names that the caller has handed over as classes; see `vouching`.
VOUCHED: ContextVar[frozenset[str]] = ContextVar("vouched", default=frozenset())


def check_stored(config: Any, file: Path, text: str | None = None) -> None:
    """Refuses a stored config, unresolved, that names code which neither this package nor the user vouches for.

    Args:
        text: the content of the file; None if the user cannot have signed it.

    Raises:
        UserError: the first such `_target_`, or an interpolation in a config that the user has not signed.
    """
    modules = None if text is None else signed_modules(file, text)
    if modules is None:
        for key, value in leaves_of(config):
            if isinstance(value, str) and "${" in value:
                raise UserError(f"{file}: {key} refers to something else ({value[:60]}), and a stored config does not")
    for key, name in leaves_of(config):
        if key.rpartition(".")[2] == "_target_" and not is_known(name) and not is_vouched(name):
            check_own(f"{file}: {key}={str(name)[:80]}", name, modules)


def leaves_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings and lists."""
    if isinstance(node, Mapping) or (isinstance(node, Sequence) and not isinstance(node, str)):
        for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from leaves_of(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, node


def check_own(where: str, name: Any, modules: Mapping[str, str] | None) -> None:
    """Refuses a name of code elsewhere, unless the user has signed it, and its module is still at its place."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)+", name):
        raise UserError(f"{where}: is no name of a class")
    module, last = name.split(".")[0], name.split(".")[-1]
    if module in (*sys.stdlib_module_names, "mlframework", "__main__"):
        raise UserError(f"{where}: is no part of a run, and is not called: do not use this file")
    if trusted := next((each for each in trusted_names() if name.startswith(f"{each}.")), None):
        raise UserError(f"{where}: {uncovered(name, trusted)}")
    here = place_of(module)
    if modules is not None and module in modules and (here in (None, modules[module]) or is_installed(here)):
        return
    if modules is None:
        why = "your key has not signed this config: it is another user's, of another machine, or was edited"
    else:
        why = f"{module} is {here} here, and was {modules.get(module)} when you signed this config"
    wanted = name if is_installed(here) else module
    raise UserError(
        f"{where}: {why}: if you trust that code, add trust={wanted}, or in Python load(..., classes=[{last}])"
    )


def uncovered(name: str, module: str) -> str:
    """Why the user's trust in a module does not cover a name in it."""
    try:
        located(name)
    except Exception as error:  # importing a user's module may raise anything
        return not_imported(name, error)
    return f"trust={module} does not cover what {module} has imported from elsewhere"


def is_known(name: Any) -> bool:
    """Whether a name is that of a class of this package, of one that computes for it, or of an installed plug-in."""
    if not isinstance(name, str):
        return False
    if found := OWN.fullmatch(name):
        room, last = found.groups()
        return last in (OF_RUNS if room == "runs" else import_module(f"mlframework.{room}").__all__)
    return bool(ELSEWHERE.fullmatch(name)) or is_of_plug_in(name)


def is_of_plug_in(name: str) -> bool:
    """Whether an installed plug-in defines the class or function of this name, or names it in its config folder."""
    packages, named = plug_ins(tuple(sys.path))
    module, _, last = name.rpartition(".")
    package = name.partition(".")[0]
    if package not in packages or not module or "._" in name:  # importing a __main__ runs it
        return name in named
    try:
        found = getattr(import_module(module), last, None)
    except ImportError:
        return name in named
    # Not what it has imported from elsewhere, as subprocess.Popen.
    return callable(found) and str(getattr(found, "__module__", "")).partition(".")[0] == package


@cache
def plug_ins(_path: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """The packages of installed plug-ins, and every `_target_` in their config folders."""
    entries = entry_points(group=GROUP)
    named: set[str] = set()
    for entry in entries:
        try:
            spec = find_spec(entry.value)
        except Exception:  # importing another package may raise anything; Hydra's search path warns of it
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in Path(folder).rglob("*.yaml"):
                named.update(re.findall(r"^\s*(?:- )?_target_:\s*([\w.]+)", file.read_text("utf-8"), re.MULTILINE))
    return frozenset(entry.value.partition(".")[0] for entry in entries), frozenset(named)


def is_vouched(name: Any) -> bool:
    """Whether the user has named this code on the command line or in Python, or a module that defines it."""
    if not isinstance(name, str):
        return False
    modules = tuple(f"{each}." for each in trusted_names())
    return name in {*VOUCHED.get(), *trusted_names()} or (name.startswith(modules) and is_own(name))


def trusted_names() -> list[str]:
    """The modules and classes that the user has named on the command line, or in the environment."""
    return [each for each in os.environ.get(TRUST, "").split(",") if each]


def is_own(name: str) -> bool:
    """Whether the object of a dotted name is defined in its package, which has not imported it from elsewhere."""
    try:
        found = located(name)
    except Exception:  # importing a user's module may raise anything; see `check_own`
        return False
    return str(getattr(found, "__module__", "")).partition(".")[0] == name.partition(".")[0]


@contextmanager
def vouching(classes: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within this context stored configs may name these classes."""
    token = VOUCHED.set(VOUCHED.get() | {f"{each.__module__}.{each.__qualname__}" for each in classes})
    try:
        yield
    finally:
        VOUCHED.reset(token)


def trust(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without `trust=my_tasks,my_layers`, whose names this process and its workers trust."""
    named = [each.partition("=")[2].strip("[] ") for each in arguments if each.startswith("trust=")]
    names = [name.strip() for each in named for name in each.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"\w+(\.\w+)*", name) or name.partition(".")[0] in sys.stdlib_module_names:
            raise InvalidValue("trust", name, "must name a module of your own, as in trust=my_tasks")
    if names:
        os.environ[TRUST] = ",".join([*filter(None, [os.environ.get(TRUST)]), *names])
    return [each for each in arguments if not each.startswith("trust=")]


def signature_of(config: Any, texts: Mapping[str, str]) -> str | None:
    """The content of the signature's file for settings, given as the texts of their files; None without a key.

    Args:
        config: the settings as plain values; the classes that they name have been imported.
    """
    names = {name for key, name in leaves_of(config) if key.rpartition(".")[2] == "_target_" and not is_known(name)}
    places = {module: place_of(module) for module in sorted({name.partition(".")[0] for name in names})}
    modules = {module: place for module, place in places.items() if place is not None}
    signature = sign(*signed(modules, texts))
    return None if signature is None else as_json({"modules": modules, "signature": signature.hex()}, indent=2)


def signed_modules(file: Path, text: str) -> dict[str, str] | None:
    """The modules elsewhere that a config named when the user signed it, with their files; None if it is not signed.

    Args:
        file, text: one of the signed files, and what was read from it: it may be another one by now.
    """
    assert file.name in SIGNED
    try:
        content = read_json(file.with_name(SIGNATURE))
        modules, signature = dict(content["modules"]), bytes.fromhex(content["signature"])
        others = {name: read_text(file.with_name(name), most=MOST_RECORD) for name in SIGNED if name != file.name}
        return modules if is_signed(signature, *signed(modules, {**others, file.name: text})) else None
    except (UserError, ValueError, TypeError, LookupError):  # there is none, or it is damaged
        return None


def signed(modules: Mapping[str, str], texts: Mapping[str, str]) -> list[str]:
    """What is signed: the places of modules, and the texts of the files."""
    return [json.dumps(modules, sort_keys=True), *(texts[name] for name in SIGNED)]


def place_of(module: str) -> str | None:
    """The file or the folders that an import of a module without points would read; None if there is none."""
    try:
        spec = find_spec(module)  # imports nothing, for it has no parent
    except ValueError:  # a module that was made by hand
        return None
    if spec is None:
        return None
    places = [spec.origin] if spec.has_location else [*(spec.submodule_search_locations or ())]
    return os.pathsep.join(os.path.realpath(place) for place in places if place) or None


def is_installed(place: str | None) -> bool:
    """Whether a module lies among the installed packages of this Python."""
    return place is not None and place.startswith(installed_places())


def check_overrides(overrides: Sequence[str], file: Path, text: str) -> None:
    """Refuses stored overrides that would read other files or values when they are composed anew.

    Args:
        text: the content of the file.
    """
    mine = signed_modules(file, text) is not None
    for override in overrides:
        plain = override.replace("\\", "")  # Hydra reads $\{x\} as ${x}
        key, _, value = plain.partition("=")
        group = "." not in key.partition("@")[0] and ".." in value
        if not mine and ("${" in plain or key.lstrip("+~").startswith("hydra") or group):
            why = "your key has not signed this run, and this would read other files or values"
            raise UserError(f"{file}: {override[:80]}: {why}: resume=true goes on without settings beside it")
