"""Trains and compares everything of docs/comparison.md, and draws its tables and figures: none are typed by hand.

`python scripts/comparisons.py run [name ...]` trains and compares what is missing, into runs/comparisons/<name>; a
repeated command goes on where it was stopped. `python scripts/comparisons.py collect` copies finished comparisons to
results/comparisons; without an argument the page is drawn from these.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from mlframework.files import as_json, atomic, write_part
from mlframework.runs.compare import Compared
from mlframework.runs.compare_report import comparison_figure, comparison_page

ROOT = Path(__file__).parents[1]
RUNS, KEPT, PAGE = ROOT / "runs" / "comparisons", ROOT / "results" / "comparisons", ROOT / "docs" / "comparison.md"

#: A training without an evaluation at its end, in one thread, so that it may share a machine.
TRAINING = ("evaluation=none", "logger.figures=false", "threads=1")


class Made(NamedTuple):
    """How a comparison comes about: overrides of its training, and of the comparison."""

    train: str
    compare: str


IMAGES = (
    "against=[scratch,finetune,linear_probe,knn_on_features,knn,gbdt,random_forest,svm,scikit_learn] "
    "evaluation.tasks=100 evaluation.validation_tasks=20 evaluation.adam_rates=[0.001,0.01] evaluation.sgd_rates=[0.1]"
)
NETWORK = "base_layer.filters=32"
CURVE = "shots=[1,5,10] curve.tasks=50 curve.validation_tasks=10"
#: Every method that takes gradient steps may take many, by any rule, on all tasks.
STEPS = (
    "++evaluation.baseline.from_scratch.steps=300 ++evaluation.baseline.from_scratch.tasks=null "
    "++evaluation.baseline.finetune.tasks=null"
)
WAVES = (
    f"{STEPS} evaluation.inner_steps=50 evaluation.tune_rule=true evaluation.tasks=200 evaluation.validation_tasks=100 "
    "curve.tasks=50 curve.validation_tasks=30"
)
TABLES = (
    "evaluation.tune_rule=true evaluation.validation_tasks=50 "
    "shots=[1,2,5,10,20] curve.tasks=60 curve.validation_tasks=20"
)
COMPARISONS = {
    "sinusoid_ridge": Made("task=sinusoid algorithm=ridge optimizer.lr=0.01 trainer.steps=2000", WAVES),
    "sinusoid_maml": Made("task=sinusoid algorithm=maml algorithm.inner_steps=5 trainer.steps=2000", WAVES),
    "omniglot_1shot": Made(f"experiment=omniglot_5w1s_prototypes trainer.steps=1500 {NETWORK}", f"{IMAGES} {CURVE}"),
    "omniglot_5shot": Made(
        f"experiment=omniglot_5w1s_prototypes task.k_shot=5 trainer.steps=800 {NETWORK}", f"{IMAGES} shots=[]"
    ),
    "text_lists": Made(
        "experiment=text_lists trainer.steps=1200",
        "evaluation.tasks=100 evaluation.validation_tasks=20 evaluation.inner_steps=20 evaluation.tune_rule=true "
        "shots=[2,5,10,20] curve.tasks=30 curve.validation_tasks=10",
    ),
    "ratings": Made(
        "task=ratings task/source=recbole task.loss=absolute algorithm=ridge_shared_head algorithm/kernel=rbf "
        "optimizer.lr=3e-3 trainer.steps=400",
        "evaluation.tasks=300 evaluation.validation_tasks=50",
    ),
    "table_schools": Made(
        "experiment=table_schools algorithm=maml suggested.inner_lr=0.003 optimizer.lr=0.003",
        f"evaluation.tasks=200 {TABLES}",
    ),
    "table_aggression": Made(
        "experiment=table_aggression algorithm=maml suggested.inner_lr=0.3 optimizer.lr=0.003",
        f"evaluation.tasks=200 {TABLES}",
    ),
    "glyphs_to_omniglot": Made(
        f"task=glyphs algorithm=prototypes trainer.steps=1000 trainer.meta_batch=8 {NETWORK}",
        f'{IMAGES} shots=[] cross=["task=omniglot task.k_query=5"]',
    ),
    "alphabets": Made(
        f"experiment=omniglot_5w1s_prototypes task.splits=alphabet trainer.steps=800 {NETWORK}", f"{IMAGES} shots=[]"
    ),
}


def make(name: str) -> None:
    """Trains and compares, or goes on with it."""
    run, made = RUNS / name, COMPARISONS[name]
    if (run / "comparison.json").exists():
        return
    if not (run / "result.json").exists():
        resume = ["resume=true"] if (run / "config.yaml").exists() else []
        call("train", *made.train.split(), *TRAINING, f"run_dir={run.relative_to(ROOT)}", *resume)
    call("compare", f"run={run.relative_to(ROOT)}", *split(made.compare))


def split(overrides: str) -> list[str]:
    """Overrides at the spaces between them; one in quotes is whole."""
    found, inside = [""], False
    for character in overrides:
        inside ^= character == '"'
        if character == " " and not inside:
            found.append("")
        else:
            found[-1] += character
    return found


def call(command: str, *arguments: str) -> None:
    print(f"mlframework-{command}", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", f"mlframework.cli.{command}", *arguments], check=True, cwd=ROOT)


def collect(name: str) -> None:
    """Keeps a finished comparison without the values of single tasks."""
    run = RUNS / name
    if not (run / "comparison.json").exists():
        return
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    typed = yaml.safe_load((run / "overrides.yaml").read_text(encoding="utf-8"))
    trained = " ".join(override for override in typed if not override.startswith("run_dir="))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    content = {**without_values(content), "trained": trained, "trained_at": environment["git"]["commit"]}
    with atomic(KEPT / f"{name}.json") as part:
        part.write_text(as_json(content, indent=1) + "\n", encoding="utf-8")


def without_values(content: Any) -> Any:
    """The same, without the values and the sources of single tasks."""
    if isinstance(content, dict):
        dropped: dict[str, Any] = {"values": {}, "sources": None}
        return {key: dropped.get(key, without_values(value)) for key, value in content.items() if key != "task_config"}
    return [without_values(each) for each in content] if isinstance(content, list) else content


def draw(name: str) -> str:
    """The section of a comparison; its figure goes to docs/."""
    content = json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))
    compared = Compared.from_json(content)
    figure = PAGE.parent / f"comparison_{name}.png"
    with atomic(figure) as part:
        comparison_figure(compared).savefig(part, format="png", dpi=80)
    page = comparison_page(compared, content).replace("comparison.png", figure.name)
    trained = f"Trained by `mlframework-train {content['trained']}` at commit {content['trained_at']}."
    title, rest = page.split("\n", 1)
    return f"##{title} ({name})\n\n{trained}\n{rest.replace(chr(10) + '## ', chr(10) + '#### ')}".rstrip()


def main() -> None:
    chosen = sys.argv[2:] or list(COMPARISONS)
    for name in chosen:
        if sys.argv[1:2] == ["run"]:
            make(name)
        if sys.argv[1:2] in (["run"], ["collect"]):
            collect(name)
    kept = [name for name in COMPARISONS if (KEPT / f"{name}.json").exists()]
    write_part(PAGE, "scripts/comparisons.py", "\n\n".join(map(draw, kept)))


if __name__ == "__main__":
    main()
