"""Reads a package's source and names each breach of the house's rules; `test_architecture.py` says what it may find."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: The rooms from the top of the house to the ground; a room imports only rooms below its own.
ROOMS = (
    *("testing", "cli", "runs", "training", "evaluation", "text", "regularisers", "meta_layers", "inner_loop"),
    *("tasks", "base_layers", "solvers", "backend"),
)
#: Modules at the top of the package that belong to no room: every room may import them.
GROUND = ("episode", "errors", "files", "keys", "processes", "reading", "screen")
#: What stands outside the backend may import of it, and which rooms may use the upper door.
LOWER_DOOR, UPPER_DOOR = "backend.forward", "backend.step"
ABOVE_THE_STEP = ("testing", "cli", "runs", "training")
#: The files with private names of other packages, and the packages.
PRIVATE = {"backend.private": ("torch",), "cli.private": ("hydra", "omegaconf")}
FOREIGN = tuple(package for packages in PRIVATE.values() for package in packages)
#: Private by their spelling, public by their documentation.
DOCUMENTED = ("_replace", "_asdict", "_fields", "_make", "_field_defaults")
#: Rooms in which no domain is known, and the rooms of the domains.
DOMAIN_FREE, DOMAINS = ("training", "evaluation"), ("tasks", "text")
#: Part of a domain-free room, but made for domains.
DOMAIN_FILES = ("evaluation.baselines", "evaluation.displays")
#: Modules that never ask what kind of object they hold.
KIND_FREE = ("training.trainer", "evaluation.evaluation")
#: The most lines of these modules, and of any function.
MODULE_LINES = {"meta_layers.gradient_descent.maml": 130, "training.outer_loop": 150}
FUNCTION_LINES = 45


class Module(NamedTuple):
    """One source file; `name` is dotted and starts below the package, which itself has the name ''."""

    name: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_package(folder: Path) -> dict[str, Module]:
    """All modules of the package in `folder`, by name."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(name, text, ast.parse(text))
    return modules


def imports(modules: dict[str, Module], package: str) -> list[tuple[str, str]]:
    """Each import of one module of the package by another, wherever in the file it stands."""
    found = set()
    for module in modules.values():
        for source, name in _imported_names(module, modules, package):
            whole = f"{source}.{name}".rstrip(".")
            target = whole if whole[len(package) + 1 :] in modules else source
            if target == package or target.startswith(f"{package}."):
                found.add((module.name, target[len(package) + 1 :]))
    return sorted(found)


def _imported_names(module: Module, modules: dict[str, Module], package: str) -> Iterator[tuple[str, str]]:
    """The source and the name of each import; the name of `import source` is ''."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module.name, modules, package)
            yield from ((source, alias.name) for alias in node.names)


def _absolute(node: ast.ImportFrom, name: str, modules: dict[str, Module], package: str) -> str:
    if not node.level:
        return node.module or ""
    is_package = name == "" or any(other.startswith(f"{name}.") for other in modules)
    parts = [package, *name.split(".")] if name else [package]
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def circles(edges: list[tuple[str, str]]) -> set[str]:
    """The imports that are part of a circle."""
    reached: dict[str, set[str]] = {}
    following: dict[str, set[str]] = {}
    for source, target in edges:
        following.setdefault(source, set()).add(target)
    for start in following:
        seen, waiting = set(), [start]
        while waiting:
            new = following.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    return {f"{source} -> {target}" for source, target in edges if source in reached.get(target, ())}


def upward(edges: list[tuple[str, str]]) -> set[str]:
    """The imports of a room that stands higher, or of no room at all."""
    found = set()
    for source, target in edges:
        here, there = source.partition(".")[0], target.partition(".")[0]
        if here == "" or there in GROUND:  # the package's own names come from every room
            continue
        if here in GROUND or (here != there and (there not in ROOMS or ROOMS.index(there) < ROOMS.index(here))):
            found.add(f"{source} -> {target}")
    return found


def homeless(modules: dict[str, Module]) -> set[str]:
    """Modules at the top of the package that are no room."""
    return {module.room for module in modules.values()} - {*ROOMS, *GROUND, ""}


def through_the_wall(edges: list[tuple[str, str]]) -> set[str]:
    """The imports of the backend's inside by other rooms, and of its upper door by rooms below the step."""
    found = set()
    for source, target in edges:
        here = source.partition(".")[0]
        if target.partition(".")[0] != "backend" or here == "backend":
            continue
        if not (target == LOWER_DOOR or (target == UPPER_DOOR and here in ABOVE_THE_STEP)):
            found.add(f"{source} -> {target}")
    return found


def private_names(modules: dict[str, Module]) -> set[str]:
    """Private names of torch and Hydra, and private attributes of objects that the package does not define."""
    own = {name for module in modules.values() for name in _defined_attributes(module.tree)}
    found = set()
    for module in modules.values():
        names = _foreign_private(module.tree, own)
        if module.name in PRIVATE:
            names = {name for name in names if name.partition(".")[0] in {*FOREIGN} - {*PRIVATE[module.name]}}
        found |= {f"{module.name}: {name}" for name in names}
    return found


def _foreign_private(tree: ast.Module, own: set[str]) -> Iterator[str]:
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.Attribute):
            root, *attributes = _dotted(node)
            names = [".".join([aliases.get(root, root), *attributes])]
            if aliases.get(root, root).partition(".")[0] not in FOREIGN and _is_private(node.attr):
                yield from {node.attr} - own - {*DOCUMENTED}
        for name in names:
            match = re.fullmatch(rf"((?:{'|'.join(FOREIGN)})(?:\.[a-zA-Z]\w*)*\._\w*[a-zA-Z0-9])(\.\w+)*", name)
            if match:
                yield match.group(1)


def _dotted(node: ast.expr) -> list[str]:
    """The parts of `a.b.c`; what is no name, such as a call, is the part ''."""
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def _aliases(tree: ast.Module) -> dict[str, str]:
    """The full name of each imported name."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def _defined_attributes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


def domains_known(modules: dict[str, Module], package: str) -> set[str]:
    """Domains that domain-free rooms import, and questions for the kind of an object in `KIND_FREE`."""
    domains = [name for name in modules if _is_domain(name, modules)]
    names = {name for domain in domains for name in public_definitions(modules[domain].tree)}
    found = {f"{here} -> {there}" for here, there in imports(modules, package) if _is_domain(there, modules)}
    for module in modules.values():
        imported = _imported_names(module, modules, package)
        found |= {
            f"{module.name} -> {name}" for source, name in imported if source == f"{package}.tasks" and name in names
        }
    found = {breach for breach in found if _is_domain_free(breach.partition(" ")[0])}
    for name in KIND_FREE:
        used = (
            {node.id for node in ast.walk(modules[name].tree) if isinstance(node, ast.Name)}
            if name in modules
            else set()
        )
        found |= {f"{name}: {question}" for question in used & {"isinstance", "issubclass", "hasattr"}}
    return found


def _is_domain(name: str, modules: dict[str, Module]) -> bool:
    """`text` and its modules, and the packages below `tasks` with theirs."""
    room, _, rest = name.partition(".")
    below = rest.partition(".")[0]
    return room == "text" or (room == "tasks" and any(other.startswith(f"tasks.{below}.") for other in modules))


def _is_domain_free(name: str) -> bool:
    return name.partition(".")[0] in DOMAIN_FREE and not name.startswith(DOMAIN_FILES)


def public_definitions(tree: ast.Module) -> set[str]:
    """The names in `__all__` that the module itself defines; the others are passed on."""
    listed, defined = set(), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            defined.update(names)
            if names == ["__all__"] and node.value:
                listed = {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return listed & defined


def defined_twice(modules: dict[str, Module]) -> set[str]:
    """Public names that two modules define."""
    count = Counter(name for module in modules.values() for name in public_definitions(module.tree))
    return {name for name, times in count.items() if times > 1}


def too_long(modules: dict[str, Module]) -> set[str]:
    """Modules and functions with more lines than they may have."""
    found = {name for name, most in MODULE_LINES.items() if name in modules and _lines(modules[name].text) > most}
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                found.add(f"{module.name}.{node.name}")
    return found


def _lines(text: str) -> int:
    return text.count("\n")


def breaches(folder: Path) -> dict[str, set[str]]:
    """Every breach in the package in `folder`, by rule."""
    modules = read_package(folder)
    edges = imports(modules, folder.name)
    return {
        "circle": circles(edges),
        "upward": upward(edges),
        "no room": homeless(modules),
        "wall": through_the_wall(edges),
        "private": private_names(modules),
        "domain": domains_known(modules, folder.name),
        "twice": defined_twice(modules),
        "long": too_long(modules),
    }
