"""Writes the tables of docs/results.md from results/*.json: nothing there is typed by hand.

`python scripts/results.py` after copying a run's `result.json` to `results/<name>.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlframework.files import write_part

ROOT = Path(__file__).parents[1]

#: What the papers report for the same setting, in percent, and where.
PAPERS: dict[str, tuple[float | None, str]] = {
    "omniglot_5w1s_maml": (98.7, "± 0.4, transductive (Finn et al. 2017, table 1)"),
    "omniglot_5w1s_fomaml": (98.3, "± 0.5, transductive (Nichol et al. 2018, table 2)"),
    "omniglot_5w1s_anil": (None, "not reported (20-way: 96.2 ± 0.5, Raghu et al. 2020)"),
    "omniglot_5w1s_maml_plus_plus": (99.47, "transductive (Antoniou et al. 2019, table 1)"),
    "omniglot_5w1s_prototypes": (98.8, "(Snell et al. 2017, table 1)"),
    "omniglot_20w1s_prototypes": (96.0, "(Snell et al. 2017, table 1)"),
    "omniglot_5w1s_ridge": (98.9, "(R2-D2, Bertinetto et al. 2019; as others cite it, not checked)"),
    "omniglot_5w1s_svm": (None, "not reported (MetaOptNet has no Omniglot)"),
    "omniglot_5w1s_cnp": (95.3, "(Garnelo et al. 2018, table 2)"),
    "omniglot_5w1s_hypernetwork": (None, "not reported"),
    "omniglot_5w1s_meta_networks": (98.95, "(Munkhdalai, Yu 2017; as others cite it, not checked)"),
}
HEADER = [
    "command",
    "method",
    "batch norm",
    "tasks",
    "before",
    "after (steps)",
    "± over sources",
    "minus the first",
    "paper (gap)",
    "outer steps, training time",
    "seed, task hash",
]


def table(metric: str, scale: float, digits: int) -> str:
    """A markdown table of one metric, a row for each method of each result that has it."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for path in sorted((ROOT / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("monitor") == metric:
            lines += [row(path.stem, result, found, metric, scale, digits) for found in result["evaluation"]["rows"]]
    return "\n".join(lines)


def row(name: str, result: dict[str, Any], found: dict[str, Any], metric: str, scale: float, digits: int) -> str:
    """One method's line."""
    intervals = found["metrics"][metric]
    before = cell(intervals[0], scale, digits) if len(intervals) > 1 else ""
    # Runs from before the protocol of choices were judged after their last step.
    at = found["steps"].index(found["chosen"]) if "chosen" in found else -1
    after = intervals[at]
    # The paper stands beside the first row, which has the policy that the algorithm was trained by.
    ours = found is result["evaluation"]["rows"][0]
    evaluation = result["evaluation"]
    cells = [
        f"`{command(result)}`" if ours else "",
        f"{found['method']}, {found['setting']}" if found.get("setting") else found["method"],
        found["batch_norm"],
        str(found["tasks"]),
        before,
        f"{cell(after, scale, digits)} ({found['steps'][at]})",
        over_sources(after, scale, digits),
        cell(found["difference"][metric], scale, digits) if found.get("difference") else "",
        paper(name, after["mean"], scale) if ours and name in PAPERS else "",
        f"{result['step']}, {result['seconds'] / 60:.0f} min" if ours else "",
        f"{evaluation['seed']}, `{evaluation['task_hash']}`" if ours else "",
    ]
    return "| " + " | ".join(cells) + " |"


def over_sources(interval: dict[str, Any], scale: float, digits: int) -> str:
    """Half the interval over sources, where there is one."""
    width = interval.get("over_sources")
    return "" if width is None else f"{width * scale:.{digits}f}"


def paper(name: str, reached: float | None, scale: float) -> str:
    """What the paper has, and how far from it ours is, unless ours has diverged."""
    value, source = PAPERS[name]
    if value is None or reached is None:
        return source if value is None else f"{value:g} {source}"
    return f"{value:g} {source}: {reached * scale - value:+.1f}"


def command(result: dict[str, Any]) -> str:
    """What was typed, but for where it was written to."""
    kept = [typed for typed in result["overrides"] if typed.split("=")[0] not in ("run_dir", "resume")]
    return " ".join(["mlframework-train", *kept])


def cell(interval: dict[str, Any], scale: float, digits: int) -> str:
    """A mean and half a 95 % interval; a number that is not finite is null in JSON."""
    mean, half_width = (
        None if value is None else f"{value * scale:.{digits}f}" for value in (interval["mean"], interval["half_width"])
    )
    if mean is None:
        return "diverges"
    return mean if half_width is None else f"{mean} ± {half_width}"


def main() -> None:
    page = ROOT / "docs" / "results.md"
    for metric, scale, digits in (("query_accuracy", 100, 1), ("query_loss", 1, 3), ("query_bits_per_character", 1, 3)):
        write_part(page, f"scripts/results.py {metric}", table(metric, scale, digits))


if __name__ == "__main__":
    main()
