"""docs/tensorboard.md names every tag that runs write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import SHORT, call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlframework.cli import train

PAGE = Path(__file__).parents[1] / "docs" / "tensorboard.md"

#: Trainings that write every kind of tag between them, with all displays that go with their tasks.
RUNS = {
    "images": (
        "task=digits",
        "algorithm=meta_sgd",
        "display=[by_inner_step,contact_sheet,confusion,predictions,learned,inner_steps,support_influence,reliability]",
    ),
    "functions": (
        "algorithm=deep_kernel",
        "display=[by_inner_step,fits,predictions,learned,inner_steps,support_influence,reliability]",
    ),
    "classes": ("task=digits", "algorithm=svm_rbf", "display=[learned]"),
}
EVALUATION = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "evaluation/baseline=[]")


def patterns() -> list[re.Pattern[str]]:
    """The tags of the page's table; `<name>` stands for anything."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    tags = [tag for row in rows for tag in re.findall(r"`([^`]+)`", row.split("|")[2])]
    return [re.compile(re.sub(r"<\w+>", ".+", re.escape(tag))) for tag in tags]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_page_has_every_tag(tmp_path, name):
    short = [each for each in SHORT if each != "logger.figures=false"]
    said = call(train.main, *short, "trainer.log_every=1", *EVALUATION, *RUNS[name], "run_dir=run", folder=tmp_path)
    assert said.exit_code == 0, said.err
    assert "is left out" not in said.err
    found = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    texts = {tag.removesuffix("/text_summary") for tag in found["tensors"]}
    tags = {*found["scalars"], *found["images"], *found["histograms"], *texts} - {"custom_scalars__config__"}
    assert len(tags) > 10
    known = patterns()
    assert not [tag for tag in tags if not any(pattern.fullmatch(tag) for pattern in known)]
