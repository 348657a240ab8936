"""`mlframework-generate`: adapts a trained run to a few texts, and prints new texts like them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path

from omegaconf import DictConfig

from mlframework.cli.command_line import command, job
from mlframework.errors import InvalidValue, UserError
from mlframework.reading import read_text
from mlframework.tasks.text.text_files import Unit, check_unit, units

__all__ = ["generate_command"]

SETTINGS = {
    "run": str,
    "support": str | list[str],
    "unit": str,
    "n": int,
    "prompt": str,
    "length": int,
    "temperature": float,
    "top_p": float,
    "stop": str | None,
    "inner_steps": int | None,
    "seed": int,
    "weights": str,
    "device": str,
}


@job(settings=SETTINGS)
def generate_command(config: DictConfig) -> None:
    """Prints `n` new texts for every set of examples."""
    check_unit(config.unit)
    files = [config.support] if isinstance(config.support, str) else list(config.support)
    if not files:
        raise InvalidValue("support", "[]", "must name a file, or - for standard input")
    # Read before anything slow, so that an error in the files shows at once.
    sets = iter([examples_in(files, config.unit)]) if files != ["-"] else sets_of_examples(sys.stdin, config.unit)
    first = next(sets)

    from mlframework.runs.trained import load

    trained = load(config.run, weights=config.weights, device=config.device)
    sampling = {name: config[name] for name in ("prompt", "length", "temperature", "top_p", "stop", "seed")}
    between = "\n" if config.unit == "line" else "\n\n"
    for examples in chain([first], sets):
        texts = trained.adapt(examples, inner_steps=config.inner_steps).generate(config.n, **sampling)
        print(*texts, sep=between, flush=True)


def examples_in(files: Iterable[str], unit: Unit) -> list[str]:
    found = []
    for file in files:
        texts = units(read_text(Path(file).expanduser()), unit)
        if not texts:
            raise UserError(f"support={file}: holds no text")
        found += texts
    return found


def sets_of_examples(lines: Iterable[str], unit: Unit) -> Iterator[list[str]]:
    r"""Sets of examples from standard input; where lines are examples, an empty line ends a set and begins another.

    >>> list(sets_of_examples(["Ada\n", "Grace\n", "\n", "Alan\n"], "line"))
    [['Ada', 'Grace'], ['Alan']]
    """
    pieces, found = lines if unit == "line" else ["".join(lines)], False
    for found_here, texts in groupby((units(piece, unit) for piece in pieces), key=bool):
        if found_here:
            found = True
            yield list(chain.from_iterable(texts))
    if not found:
        raise UserError("support=-: standard input holds no text")


main = command(generate_command, config_name="generate", of_file="support")

if __name__ == "__main__":
    main()
