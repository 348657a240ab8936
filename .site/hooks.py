"""What the site has beside docs/: the README as its first page, and a page of reference for each room."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

#: A fence that names a file, as in ```python my_tasks.py.
NAMED_FENCE = re.compile(r"^```(\w+) (\S+)$", re.MULTILINE)


def rooms() -> list[str]:
    """The rooms of the package, in alphabetical order."""
    return sorted(path.parent.name for path in (ROOT / "mlframework").glob("*/__init__.py"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the reference of each room in the navigation."""
    assert config.nav
    config.nav[-1]["Reference"] = [{name: f"reference/{name}.md"} for name in ("modules", *rooms())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
        readme = readme.replace(f"({name}.md)", f"({name.lower()}.md)")
    files.append(File.generated(config, "index.md", content=readme))
    for room in rooms():
        page = f"# {room}\n\n::: mlframework.{room}\n"
        files.append(File.generated(config, f"reference/{room}.md", content=page))
    page = "# Modules of the package\n\n" + "".join(
        f"::: mlframework.{path.stem}\n\n"
        for path in sorted((ROOT / "mlframework").glob("*.py"))
        if path.stem != "__init__"
    )
    files.append(File.generated(config, "reference/modules.md", content=page))
    return files


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Shows the name of a file above its code."""
    return NAMED_FENCE.sub(
        lambda found: f"```{found[1]}" + (f' title="{found[2]}"' if "." in found[2] else ""), markdown
    )
