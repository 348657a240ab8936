"""The interface of loggers: where a run's curves, figures, texts and settings go."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mlframework.evaluation.interval import Interval
from mlframework.files import leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Logger", "Silent", "finite", "hyperparameters"]

#: Parts of the config that do not change what is learned.
NOT_HYPERPARAMETERS = ("run_dir", "resume", "logger", "evaluation", "display", "suggested")


class Logger(ABC):
    """Takes what a run tells. Tags are `split/metric`, such as `train/query_loss`; the x axis is the outer step.

    Args:
        folder: of the run.
        start: the step from which this process writes; 0 for a new run.
        figures: whether displays write here.
    """

    def __init__(self, folder: Path, *, start: int, figures: bool = True) -> None:
        self.folder, self.start, self.figures = folder, start, figures

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Refuses settings by which nothing can be written, before a run begins: the constructor's keywords."""
        return

    @abstractmethod
    def config(self, config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
        """The settings of a run at its start; `choices` are the options by group, `overrides` those that were typed."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve, by tag."""

    @abstractmethod
    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """The distribution of each tensor's numbers, by tag; numbers that are not finite are left out."""

    @abstractmethod
    def figure(self, tag: str, figure: Figure, step: int) -> None: ...

    @abstractmethod
    def text(self, tag: str, text: str, step: int | None = None) -> None:
        """A text in markdown."""

    @abstractmethod
    def flush(self) -> None:
        """Returns once all points are on disk."""

    @abstractmethod
    def close(self, error: str | None = None, *, finished: bool = False) -> None:
        """Ends the log of a run that has finished, or failed with an error; of one that was interrupted with neither.

        An interrupted or failed run may be resumed.
        """

    def intervals(self, split: str, metrics: Mapping[str, Interval], step: int) -> None:
        """A point of each metric, with the ends of its interval, at an outer step; tags start with the split."""
        values = {}
        for name, (mean, width, *_) in metrics.items():
            values[f"{split}/{name}"] = mean
            if not math.isnan(width):
                bounds = f"{split}/{name}_interval"
                values |= {f"{bounds}/lower": mean - width, f"{bounds}/upper": mean + width}
        self.scalars(values, step)

    def by_step(self, split: str, metrics: Mapping[str, Sequence[Interval]], step: int) -> None:
        """A point of each metric after 0, 1, ... inner steps, at an outer step; tags start with the split."""
        for name, intervals in metrics.items():
            self.scalars({f"{split}/{name}_by_step/{inner}": each.mean for inner, each in enumerate(intervals)}, step)


class Silent(Logger):
    """Writes nothing: of several processes one writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, start=0, figures=False)

    def config(self, config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
        return

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        return

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        return

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        return

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        return

    def flush(self) -> None:
        return

    def close(self, error: str | None = None, *, finished: bool = False) -> None:
        return


def hyperparameters(config: DictConfig, choices: Mapping[str, str]) -> dict[str, float | str]:
    """The hyperparameters of a run: the chosen options by group, then every leaf of the config by its dotted key."""
    resolved = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    shown = {key: value for key, value in resolved.items() if key not in NOT_HYPERPARAMETERS}
    options = {group.partition("@")[0]: option for group, option in choices.items()}
    named = {name: option for name, option in options.items() if name.split("/")[0] in shown and option != "default"}
    return named | {k: plain(v) for k, v in leaves(shown) if k.rpartition(".")[2] not in ("_target_", "_partial_")}


def finite(tensor: Tensor) -> Tensor:
    """The finite numbers of a tensor `[n]`, on the CPU."""
    numbers = tensor.detach().flatten().cpu()
    return numbers[numbers.isfinite()]


def plain(value: Any) -> float | str:
    """The value itself if it is a number, else as text: `null`, `true`, `[40, 40]`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, list):
        return f"[{', '.join(str(plain(item)) for item in value)}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))
