"""Draws docs/board.md from results/board, after adding the comparisons of the run folders that are named.

`python scripts/board.py` draws; `python scripts/board.py runs/mine runs/other` adds `comparison.json` of these first.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mlframework.evaluation.number_format import shown_interval
from mlframework.files import write_part
from mlframework.runs.board import BoardRecord, add_to_board, read_board
from mlframework.tasks.task_distribution import TaskDistribution

ROOT = Path(__file__).parents[1]
BOARD, PAGE = ROOT / "results" / "board", ROOT / "docs" / "board.md"

COLUMNS = ("method", "mean ± 95 %", "over sources", "seeds", "setting", "training", "comparison", "commit", "machine")


def board_tables(records: Sequence[BoardRecord]) -> str:
    """A table for each set of tasks and metric, the best first."""
    groups: dict[tuple[str, str, str, str], list[BoardRecord]] = defaultdict(list)
    for record in records:
        groups[record.task, str(record.task_config.get("k_shot", "")), record.hash, record.metric].append(record)
    return "\n\n".join(board_table(groups[key]) for key in sorted(groups))


def board_table(records: Sequence[BoardRecord]) -> str:
    """One table, all of whose methods are judged on the same tasks."""
    first = records[0]
    k_shot = first.task_config.get("k_shot")
    shots = f", {k_shot} shots" if k_shot is not None else ""
    higher = first.metric.removeprefix("query_") in TaskDistribution.higher_is_better
    drawn = f"{first.tasks} {first.split} tasks, `{first.hash}`"
    lines = [f"### {first.task}{shots}: {first.metric.replace('_', ' ')} ({drawn})", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for record in sorted(records, key=lambda each: -each.mean if higher else each.mean):
        over = "" if record.over_sources is None else f"± {record.over_sources:.2g}"
        value = shown_interval(record.mean, record.half_width)
        cells = [record.method, value, over, ", ".join(map(str, record.seeds)), record.setting]
        cells += [f"`{record.trained}`", f"`{record.command}`"]
        lines.append("| " + " | ".join([*cells, f"`{record.commit[:8]}`", record.machine]) + " |")
    return "\n".join(lines)


def main() -> None:
    for folder in sys.argv[1:]:
        content = json.loads((Path(folder) / "comparison.json").read_text(encoding="utf-8"))
        add_to_board(content, BOARD)
    write_part(PAGE, "scripts/board.py", board_tables(list(read_board(BOARD).values())))


if __name__ == "__main__":
    main()
