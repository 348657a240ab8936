"""Curves, figures, the config and the HParams entry of a run, for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mlframework.backend.step import event_writer
from mlframework.evaluation.interval import Interval
from mlframework.files import leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TensorBoardLogger", "hyperparameters"]

#: Parts of the config that do not change what is learned.
NOT_HYPERPARAMETERS = ("run_dir", "resume", "logger", "evaluation", "display", "suggested")

#: TensorBoard takes the columns of a whole sweep from one of its runs: every run names the metrics of the others too.
HPARAMS_METRICS = ("validation/query_loss", "validation/query_accuracy")
HPARAMS_FIRST = ("algorithm", "task")


class TensorBoardLogger:
    """Writes TensorBoard events into the run's own folder.

    Args:
        start: the step from which this process writes; later points of an interrupted process are dropped.
        figures: whether displays write here, which takes about half a second each.
    """

    def __init__(self, folder: Path, *, start: int, figures: bool = True) -> None:
        self.figures = figures
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        self.start = start

    def config(self, config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
        """The config as text, an HParams entry, and charts of the main metrics with their intervals.

        Written once, at a run's start: a sweep can be compared while it runs, and a resumed run has said it already.
        HParams shows the columns of the user's overrides, as in `algorithm.inner_steps=3`, first.
        """
        if self.start:
            return
        self.text("config", f"```yaml\n{OmegaConf.to_yaml(config, resolve=True)}```")
        main = dict.fromkeys(("validation/query_loss", f"validation/{config.trainer.monitor}"))
        charts = {tag: ["Margin", [tag, f"{tag}_interval/lower", f"{tag}_interval/upper"]] for tag in main}
        self.writer.add_custom_scalars({"mean and 95 % interval over tasks": charts})
        # Not SummaryWriter.add_hparams: it makes a run of its own beside this one.
        metrics = dict.fromkeys((*main, *HPARAMS_METRICS), 0.0)
        experiment, start, end = hparams(hyperparameters(config, choices), metrics)
        show_first(experiment, {*HPARAMS_FIRST, *(override.split("=")[0].lstrip("+~") for override in overrides)})
        for summary in (experiment, start, end):
            event_writer(self.writer).add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve; names are tags, such as `train/query_loss`."""
        # One event for all of them: an event costs a step more than any value in it.
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event_writer(self.writer).add_summary(Summary(value=points), step)

    def intervals(self, split: str, metrics: Mapping[str, Interval], step: int) -> None:
        """A point of each metric, with the ends of its interval, at an outer step; tags start with the split."""
        for name, (mean, width, *_) in metrics.items():
            self.scalars({f"{split}/{name}": mean}, step)
            if not math.isnan(width):
                bounds = f"{split}/{name}_interval"
                self.scalars({f"{bounds}/lower": mean - width, f"{bounds}/upper": mean + width}, step)

    def by_step(self, split: str, metrics: Mapping[str, Sequence[Interval]], step: int) -> None:
        """A point of each metric after 0, 1, ... inner steps, at an outer step; tags start with the split."""
        for name, intervals in metrics.items():
            self.scalars({f"{split}/{name}_by_step/{inner}": each.mean for inner, each in enumerate(intervals)}, step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # Not SummaryWriter.add_figure: it needs pyplot, which picks a backend for the whole process.
        self.writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        self.writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Returns once all points are on disk; a thread writes them."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def hyperparameters(config: DictConfig, choices: Mapping[str, str]) -> dict[str, float | str]:
    """The hyperparameters of a run: the chosen options by group, then every leaf of the config by its dotted key."""
    resolved = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    shown = {key: value for key, value in resolved.items() if key not in NOT_HYPERPARAMETERS}
    options = {group.partition("@")[0]: option for group, option in choices.items()}
    named = {name: option for name, option in options.items() if name.split("/")[0] in shown and option != "default"}
    return named | {k: plain(v) for k, v in leaves(shown) if k.rpartition(".")[2] not in ("_target_", "_partial_")}


def show_first(experiment: Summary, names: Collection[str]) -> None:
    """Marks hyperparameters as those in which runs differ; TensorBoard shows five, and these before others."""
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in names
    plugin.content = data.SerializeToString()


def plain(value: Any) -> float | str:
    """The value itself if it is a number, else as text: `null`, `true`, `[40, 40]`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, list):
        return f"[{', '.join(str(plain(item)) for item in value)}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))
