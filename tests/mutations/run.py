"""Puts faults into a copy of the code, one line at a time, and runs the test that must notice each.

    python tests/mutations/run.py [--only WORD] [--jobs 2]

A fault is killed where its named test fails. A test that cannot be collected or does not end has noticed nothing, and
one that passes lets the fault survive: the tests have a hole.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.table import Table
from table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]

#: What tests read; nothing else is copied.
COPIED = ("mlframework", "tests", "conf", "docs", "results", "scripts", "README.md", "CHANGELOG.md", "pyproject.toml")

#: Imported once: the processes that run tests are forks, which have them already.
HEAVY = ("torch._dynamo", "torch.utils.tensorboard", "scipy.stats", "safetensors.torch", "sklearn.linear_model")

#: Seconds after which a test has not noticed a fault.
PATIENCE = 300

#: Exceptions of a fault that is no program any more.
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")


class Outcome(NamedTuple):
    """What became of a mutation.

    Attributes:
        mutation: which.
        status: `killed`, `SURVIVED` or `INVALID`.
        line: the first line of the failure.
        seconds: of the test.
    """

    mutation: Mutation
    status: str
    line: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    if not chosen:
        sys.exit(f"no mutation's name holds {arguments.only!r}")
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = copy_tree(Path(folder) / "0")
        for mutation in chosen:
            mutated(mutation, tree)  # a stale mutation is said before anything is run
        check_unmutated(tree, [mutation.test for mutation in chosen])
        others = (Path(folder) / str(number) for number in range(1, arguments.jobs))
        outcomes = run_all(chosen, [tree, *(Path(shutil.copytree(tree, other, symlinks=True)) for other in others)])
    print_table(outcomes)
    return int(any(outcome.status != "killed" for outcome in outcomes))


def copy_tree(tree: Path) -> Path:
    """A copy of the code and its tests that python imports in place of the installed one."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, tree / name)
    (tree / "mlframework" / "conf").symlink_to(Path("..") / "conf")  # as the installed package has it
    asked = "import mlframework.conf; print(mlframework.__file__, mlframework.conf.__file__)"
    command, environment = [sys.executable, "-c", asked], {**os.environ, "PYTHONPATH": str(tree)}
    found = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout
    if not all(Path(file).is_relative_to(tree) for file in found.split()):
        sys.exit(f"python imports {found}, and not the copy in {tree}")
    return tree


def run_pytest(tree: Path, *tests: str, keep_bytecode: bool = False) -> int | None:
    """Runs tests in a copy, until one fails; how pytest ended, or None if it did not."""
    process = multiprocessing.get_context("fork").Process(target=in_tree, args=(tree, tests, keep_bytecode))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def in_tree(tree: Path, tests: Sequence[str], keep_bytecode: bool) -> None:
    """Becomes a pytest that imports a copy; its output is in `output.txt`, its report in `report.xml`."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # of the commands that tests start
    if not keep_bytecode:  # that of a mutation could be taken for the file's own later
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    spec = importlib.util.find_spec("mlframework")
    assert spec is not None and spec.origin is not None and Path(spec.origin).is_relative_to(tree), spec
    options = ("-n0", "-x", "-q", "-m", "", "-p", "no:cacheprovider", "--junitxml=report.xml")
    with open("output.txt", "w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = int(pytest.main([*options, *tests]))
    os._exit(status)


def check_unmutated(tree: Path, tests: Sequence[str]) -> None:
    """Ends the program unless the tests pass, none skipped, while nothing is mutated."""
    by_file: dict[str, list[str]] = {}
    for test in dict.fromkeys(tests):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    for file, own in by_file.items():
        began = time.monotonic()
        status = run_pytest(tree, *own, keep_bytecode=True)
        output = (tree / "output.txt").read_text()
        if status != 0 or "skipped" in output.splitlines()[-1]:
            sys.exit(f"{output}\nnot every test of {file} passes, and nothing is mutated yet")
        print(f"{file}: {len(own)} tests pass unmutated ({time.monotonic() - began:.0f} s)", flush=True)


def run_all(mutations: Sequence[Mutation], trees: Sequence[Path]) -> list[Outcome]:
    """The outcome of each mutation, each in a copy that nobody else uses meanwhile."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def run(mutation: Mutation) -> Outcome:
        tree = free.get()
        try:
            outcome = outcome_of(mutation, tree)
        finally:
            free.put(tree)
        print(f"{outcome.status:8} {mutation.name} ({outcome.seconds:.0f} s): {outcome.line}"[:160], flush=True)
        return outcome

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(run, mutations))


def mutated(mutation: Mutation, tree: Path) -> str:
    """The text of the file with the fault in it."""
    text = (tree / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        sys.exit(
            f"stale mutation {mutation.name!r}: its text stands {text.count(mutation.old)} times in {mutation.file}"
        )
    return text.replace(mutation.old, mutation.new)


def outcome_of(mutation: Mutation, tree: Path) -> Outcome:
    """Puts a fault in, runs its test, takes the fault out."""
    file, fault, began = tree / mutation.file, mutated(mutation, tree), time.monotonic()
    kept = file.with_suffix(".kept")
    file.rename(kept)
    try:
        file.write_text(fault, encoding="utf-8")
        status, line = judged(tree, run_pytest(tree, mutation.test))
    finally:
        kept.replace(file)  # with its time, by which python knows the bytecode
    return Outcome(mutation, status, line, time.monotonic() - began)


def judged(tree: Path, status: int | None) -> tuple[str, str]:
    """What a mutation is and why, from how pytest ended and its report."""
    if status == 0:
        return "SURVIVED", ""
    if status is None:
        return "INVALID", f"no end within {PATIENCE} s"
    failures = [] if status != 1 else list(ElementTree.parse(tree / "report.xml").iter("failure"))
    if not failures:
        return "INVALID", ((tree / "output.txt").read_text().splitlines() or [""])[-1]
    line = failures[0].get("message", "").strip().partition("\n")[0]
    return "INVALID" if line.startswith(BROKEN) else "killed", line


def print_table(outcomes: Sequence[Outcome]) -> None:
    table = Table()
    for column in ("mutation", "file", "killed by", "how"):
        table.add_column(column, overflow="fold")
    for mutation, status, line, _ in outcomes:
        by = mutation.test.removeprefix("tests/") if status == "killed" else f"{status}: {mutation.test}"
        table.add_row(mutation.name, mutation.file.removeprefix("mlframework/"), escaped(by), escaped(line[:60]))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    killed = sum(outcome.status == "killed" for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    console.print(f"{killed} of {len(outcomes)} mutations killed, in {seconds:.0f} s of tests")


def escaped(text: str) -> str:
    """A text in which rich finds no markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
