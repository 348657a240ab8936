"""`--help`: every key with its comment, algorithms by family; read from files, so that nothing is imported for it."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf

__all__ = ["commented", "comments_in", "family_of", "groups_of", "meanings"]

PACKAGE = Path(__file__).parents[1]

#: The families of algorithms, by their folder in `meta_layers/`.
FAMILIES = {
    "gradient_descent": "Meta-Gradient-Descent",
    "neural_network": "Meta-Neural-Network",
    "svm": "Meta-SVM",
    "": "your own",
}

#: The columns of a key with its value, and the least and the greatest width of the page.
KEYS, WIDTHS = 44, (100, 140)


def commented(config: DictConfig, texts: Iterable[tuple[str, str]], *, resolve: bool = False) -> str:
    """A config as yaml, with the comment of each key.

    A comment is that of the last yaml that has one; else the constructor's docstring says what the key means.

    Args:
        texts: the package and the content of each yaml, in the order in which they were composed.
        resolve: whether interpolations are shown as their values.
    """
    told = meanings(config)
    for package, content in texts:
        told |= comments_in(content, package)
    width = min(max(shutil.get_terminal_size((120, 0)).columns, WIDTHS[0]), WIDTHS[1])
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))
    lines = [with_comment(line, told.get(key, ""), width) for key, line in lines_of(plain)]
    return "\n".join(part for line in lines for part in line) + "\n"


def lines_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key and the line of yaml of each key; lists stand on one line, as they are typed."""
    indent = "  " * prefix.count(".")
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{prefix}{name}", f"{indent}{name}:"
            yield from lines_of(value, f"{prefix}{name}.")
        elif name != "_partial_":
            shown = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
            yield f"{prefix}{name}", f"{indent}{name}: {shown.removesuffix('...' + chr(10)).strip()}"


def with_comment(line: str, comment: str, width: int) -> list[str]:
    """A line of yaml with a comment behind it, which goes on below; a long line has it below."""
    if not comment:
        return [line]
    wrapped = [f"# {part}" for part in textwrap.wrap(comment, width - KEYS - 2)]
    if len(line) >= KEYS:
        return [line, *(" " * KEYS + part for part in wrapped)]
    return [line.ljust(KEYS) + wrapped[0], *(" " * KEYS + part for part in wrapped[1:])]


def comments_in(text: str, package: str = "") -> dict[str, str]:
    """The comment of each key of a yaml, by dotted key: behind its value, or in the lines above it.

    >>> comments_in("seed: 0 # of all draws\\n# what goes\\n# with it\\nmore:\\n  lr: 1", "task")
    {'task.seed': 'of all draws', 'task.more': 'what goes with it'}
    """
    lines, found = text.splitlines(), {}
    for key, name, value in keys_in(text):
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        line, column = (name.end_mark.line, name.end_mark.column + 1) if block else mark_of(value)
        behind = re.fullmatch(r"\s*#\s*(.*)", lines[line][column:]) if line < len(lines) else None
        comment = behind[1] if behind else " ".join(above(lines, name.start_mark.line))
        if comment:
            found[".".join(filter(None, [package, key]))] = comment
    return found


def mark_of(value: yaml.Node) -> tuple[int, int]:
    return value.end_mark.line, value.end_mark.column


def above(lines: Sequence[str], line: int) -> list[str]:
    """The comment lines directly above a line."""
    first = line
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
    return [each.strip().lstrip("# ") for each in lines[first:line] if "@package" not in each]


def keys_in(text: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Dotted keys of a yaml with the nodes of the last name and of the value."""

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            key = prefix + str(name.value)
            yield key, name, value
            yield from walk(value, f"{key}.")

    yield from walk(yaml.compose(text), "")


def meanings(config: DictConfig, prefix: str = "") -> dict[str, str]:
    """What the docstrings of the constructors that a config names say about its keys."""
    found: dict[str, str] = {}
    target = config.get("_target_")
    for name, value in ((str(key), value) for key, value in config.items_ex(resolve=False)):
        if isinstance(target, str) and not name.startswith("_"):
            found[prefix + name] = meaning(target, name)
        if isinstance(value, DictConfig):
            found |= meanings(value, f"{prefix}{name}.")
    return {key: text for key, text in found.items() if text}


def meaning(target: str, name: str) -> str:
    """The first sentence about an argument in the docstring of a class, or of one that it extends; '' if none."""
    module, _, own = target.rpartition(".")
    places, seen = [place_of(module, own)], set()
    while places:
        place = places.pop(0)
        if place is None or place in seen:
            continue
        seen.add(place)
        for node in ast.walk(parsed(place[0])):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == place[1]:
                text = arguments_in(ast.get_docstring(node) or "").get(name, "")
                if text and not text.startswith("see `"):
                    return text
                places += [imported(place[0], base) for base in bases_of(node)]
    return ""


def bases_of(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    return [base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)]


def arguments_in(docstring: str) -> dict[str, str]:
    """The first sentence about each argument in the part `Args:` of a docstring.

    >>> arguments_in("Does it.\\n\\nArgs:\\n    a, b: two\\n        numbers. Any.\\n    c: one\\n\\nReturns: it")
    {'a': 'two numbers', 'b': 'two numbers', 'c': 'one'}
    """
    part = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    entries = re.split(r"^    (?=\S)", part[1], flags=re.MULTILINE) if part else []
    found: dict[str, str] = {}
    for names, _, text in (" ".join(entry.split()).partition(": ") for entry in entries):
        first = re.split(r"\.(?: |$)", text)[0]
        found |= {name: first for name in names.split(", ") if re.fullmatch(r"\w+", name) and first}
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place_of(module: str, name: str) -> tuple[Path, str] | None:
    """The file in which a class is defined, and its name; None where that would have to be imported."""
    own = module.split(".")
    if own[0] == PACKAGE.name:
        folder = PACKAGE.joinpath(*own[1:])
        if (folder / "__init__.pyi").is_file():
            return imported(folder / "__init__.pyi", name)
        return (folder.with_suffix(".py"), name) if folder.with_suffix(".py").is_file() else None
    spec = find_spec(module) if len(own) == 1 and module else None  # a file beside the user
    origin = (spec and spec.origin) or ""
    return (Path(origin), name) if origin.endswith(".py") else None


def imported(path: Path, name: str) -> tuple[Path, str] | None:
    """The place of a name that a file defines or imports."""
    for node in parsed(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, name
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            if node.level:
                return path.parent.joinpath(*node.module.split(".")).with_suffix(".py"), name
            return place_of(node.module, name)
    return None


def groups_of(options: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> str:
    """Each group with its options; algorithms by family.

    Args:
        texts: the yaml of each option of the group `algorithm`.
    """
    lines = []
    for group, names in options.items():
        if group != "algorithm":
            lines.append(f"{group}: {', '.join(names)}")
            continue
        families: dict[str, list[str]] = {folder: [] for folder in FAMILIES}
        for name in names:
            families[family_of(name, texts)].append(name)
        lines += [f"{group}, {FAMILIES[folder]}: {', '.join(of)}" for folder, of in families.items() if of]
    return "\n".join(lines) + "\n"


def family_of(name: str, texts: Mapping[str, str]) -> str:
    """The folder of the class that an algorithm's yaml names, or the yaml that it extends; '' for one elsewhere."""
    content: dict[str, Any] = yaml.safe_load(texts.get(name, "")) or {}
    if "_target_" in content:
        module, _, own = str(content["_target_"]).rpartition(".")
        place = place_of(module, own)
        inside = place[0].relative_to(PACKAGE).parts if place and place[0].is_relative_to(PACKAGE) else ("", "")
        return inside[1] if inside[1] in FAMILIES else ""
    extended = [each for each in content.get("defaults", []) if isinstance(each, str) and each in texts]
    return family_of(extended[0], texts) if extended else ""
