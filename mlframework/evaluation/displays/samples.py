"""Generated texts beside the examples that they should resemble: before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch

from mlframework.episode import Episode
from mlframework.evaluation.part import Display, Log, Validated
from mlframework.inner_loop.inner_loop import ends
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.tasks.text.text_tasks import as_text
from mlframework.text.generation import Sampling, generate

__all__ = ["Samples", "sample_sheet"]

#: Examples and generated texts that are shown of each task.
SHOWN = 5


class Samples(Display):
    """Writes support examples of the first validation tasks beside generated texts."""

    def check(self, task: TaskDistribution) -> None:
        as_text(task)

    def show(self, validated: Validated, log: Log) -> None:
        log.text("validation/samples", sample_sheet(validated.meta_layer, validated.episode), validated.step)


def sample_sheet(meta_layer: MetaLayer, episode: Episode) -> str:
    """A table in markdown for each task of an episode: support examples, and texts drawn before and after adapting."""
    sheets = [task_sheet(meta_layer, episode.tasks(slice(i, i + 1))) for i in range(episode.num_tasks)]
    return "\n\n".join(f"**task {number}**\n\n{sheet}" for number, sheet in enumerate(sheets, start=1))


def task_sheet(meta_layer: MetaLayer, episode: Episode) -> str:
    """The table of one task; an algorithm without inner steps has no column for before."""
    task = as_text(meta_layer.task)
    sampling = Sampling(length=task.spec.x_shape[0])
    with torch.no_grad():
        models = ends(meta_layer.trajectory(episode.support, meta_layer.test_inner_steps))
    rows = zip(episode.support.y[0], episode.support.mask[0], strict=True)
    columns = {"support": [task.decode(y[mask > 0].tolist()) for y, mask in rows][:SHOWN]}
    titles = ["before", f"after {meta_layer.test_inner_steps} steps"] if len(models) > 1 else ["adapted"]
    for title, adapted in zip(titles, models, strict=True):
        generator = torch.Generator().manual_seed(0)
        columns[title] = generate(meta_layer, adapted, count=SHOWN, sampling=sampling, generator=generator)
    return table(columns)


def table(columns: Mapping[str, Sequence[str]]) -> str:
    """Columns of texts as a table in markdown."""
    lines = [list(columns), ["---"] * len(columns), *zip_longest(*columns.values(), fillvalue="")]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: str) -> str:
    """A text on one line, with nothing that markdown would read."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~" else c for c in " ".join(text.split()))
