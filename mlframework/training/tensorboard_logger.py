"""TensorBoard's event files, in the run's own folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, histogram, hparams, image, text as text_summary

from mlframework.training.event_file import EventFile, cut_events
from mlframework.training.logger import Logger, finite, hyperparameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TensorBoardLogger"]

#: TensorBoard takes the columns of a whole sweep from one of its runs: every run names the metrics of the others too.
HPARAMS_METRICS = ("query_loss", "query_accuracy")
HPARAMS_FIRST = ("algorithm", "task")

#: Of a histogram, of equal width.
BINS = 30

#: 1 for a run that has finished, 0 for one that failed; nothing for one that is running, or that was killed.
FINISHED = "run/finished"

#: The end of the name of the file that a failed run writes last; a resumed run removes it.
FAILED = ".failed"


class TensorBoardLogger(Logger):
    """Writes TensorBoard events into the run's own folder.

    Args:
        start: the step from which this process writes; later points of an interrupted process are removed.
        figures: whether displays write here.
    """

    def __init__(self, folder: Path, *, start: int, figures: bool = True) -> None:
        super().__init__(folder, start=start, figures=figures)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"events.*{FAILED}"):
            path.unlink()
        if start:
            cut_events(folder, start)
        self.events = EventFile(folder, start=start)
        self.ends: Summary | None = None
        self.last = start

    def config(self, config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
        """The config as text, an HParams entry, and charts of the main metrics with their intervals.

        Written once, at a run's start: a sweep can be compared while it runs, and a resumed run has said it already.
        HParams shows the columns of the user's overrides, as in `algorithm.inner_steps=3`, first.
        """
        monitored = dict.fromkeys(("query_loss", str(config.trainer.monitor)))
        names = dict.fromkeys((*monitored, *HPARAMS_METRICS))
        # TensorBoard shows the first five, unless others are ticked.
        metrics = [f"{split}/{name}" for split in ("test", "best", "validation") for name in names]
        # Not SummaryWriter.add_hparams: it makes a run of its own beside this one.
        entry = hparams(hyperparameters(config, choices), dict.fromkeys((FINISHED, *metrics, "best/step"), 0.0))
        experiment, begin, self.ends = entry
        if self.start:
            return
        self.text("config", f"```yaml\n{OmegaConf.to_yaml(config, resolve=True)}```")
        tags = [f"validation/{name}" for name in monitored]
        charts = {tag: ["Margin", [tag, f"{tag}_interval/lower", f"{tag}_interval/upper"]] for tag in tags}
        self.events.add(custom_scalars({"mean and 95 % interval over tasks": charts}))
        show_first(experiment, {*HPARAMS_FIRST, *(override.split("=")[0].lstrip("+~") for override in overrides)})
        for summary in (experiment, begin):
            self.events.add(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        # One event for all of them: an event costs a step more than any value in it.
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.events.add(Summary(value=points), step)
        self.last = max(self.last, step)

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        for tag, tensor in values.items():
            if len(numbers := finite(tensor)):  # TensorBoard takes no empty histogram
                self.events.add(histogram(tag, numbers.numpy(), BINS), step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # Not torch's conversion of a figure: it needs pyplot, which picks a backend for the whole process.
        self.events.add(image(tag, np.asarray(canvas.buffer_rgba())[..., :3], dataformats="HWC"), step)

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        self.events.add(text_summary(tag, text), step)

    def flush(self) -> None:
        self.events.flush()

    def close(self, error: str | None = None, *, finished: bool = False) -> None:
        """Marks a run that finished or failed; of a failed one the error is a text.

        TensorBoard keeps the first mark that it reads of a run, so a failure has a file of its own.
        """
        if finished:
            self.mark(self.events, "STATUS_SUCCESS")
        self.events.close()
        if error is not None:
            failed = EventFile(self.folder, suffix=FAILED)
            failed.add(text_summary("error", error), self.last)
            self.mark(failed, "STATUS_FAILURE")
            failed.close()

    def mark(self, events: EventFile, status: str) -> None:
        if self.ends is not None:
            plugin = self.ends.value[0].metadata.plugin_data
            data = HParamsPluginData.FromString(plugin.content)
            data.session_end_info.status = Status.Value(status)
            plugin.content = data.SerializeToString()
            events.add(self.ends)
        point = Summary.Value(tag=FINISHED, simple_value=float(status == "STATUS_SUCCESS"))
        events.add(Summary(value=[point]), self.last)


def show_first(experiment: Summary, names: Collection[str]) -> None:
    """Marks hyperparameters as those in which runs differ; TensorBoard shows five, and these before others."""
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in names
    plugin.content = data.SerializeToString()
