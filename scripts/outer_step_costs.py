"""Prints the table of costs in docs/meta_gradient_descent.md, from results/benchmarks/costs.json.

`python benchmarks/costs.py --json results/benchmarks/costs.json` counts them: operations in forward passes over the
support set and peak memory, of one outer step for one task.
"""

from __future__ import annotations

from performance import cells, results, slashed, table

ALGORITHMS = (
    "maml",
    "maml algorithm.checkpoint_steps=true",
    "fomaml",
    "maml algorithm/meta_gradient=truncated algorithm.meta_gradient.steps=1",
    "anil",
    "boil",
    "meta_sgd",
    "maml_plus_plus",
    "meta_curvature",
    "learned_update",
    "proto_maml",
    "cavia_film",
    "reptile",
    "imaml",
    "lora",
    "joint",
)


def main() -> None:
    by = {(cell["algorithm"], cell["inner_steps"]): cell for cell in cells(results("costs"))}
    steps = " / ".join(str(count) for count in sorted({count for _, count in by if count}))
    headings = ["`algorithm=`", f"passes at {steps} inner steps", f"MB at {steps} inner steps"]
    rows = [
        [f"`{name}`", *slashed(by, name, "passes", "{:.0f}"), *slashed(by, name, "mb", "{:.0f}")] for name in ALGORITHMS
    ]
    print(table(headings, rows))


if __name__ == "__main__":
    main()
